# Two targets do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Large blocks stay with the process instead of going back to the system at every step: a quarter faster on a CPU.
FAST := MALLOC_TOP_PAD_=1073741824 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592

.PHONY: demo test lint clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# liger is an oracle in tests; without its dependency, Triton, which serves accelerators only
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps liger-kernel
	touch $@

demo: $(INSTALLED)
	$(FAST) $(BIN)/expunge run --out runs/demo

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint
	$(FAST) $(BIN)/python -m pytest

clean:
	rm -rf $(VENV) runs build

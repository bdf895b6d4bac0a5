# Two targets do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
UV := $(BIN)/uv pip install --quiet --system-certs --python $(BIN)/python --constraint constraints.txt
# Modules are compiled once, by whoever imports them first, and not again in every process.
export PYTHONDONTWRITEBYTECODE :=
# Large blocks stay with the process instead of going back to the system at every step: a quarter faster on a CPU.
FAST := MALLOC_TOP_PAD_=1073741824 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592

APT := DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20

.PHONY: demo test pytest lint browser clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# pip knows where a machine keeps its CPU build of torch; uv installs the rest in less than half of pip's time
	$(BIN)/pip install --quiet --constraint constraints.txt --no-compile torch==2.13.0 uv
	$(UV) --editable '.[dev]'
	# liger is an oracle in tests; without its dependency, Triton, which serves accelerators only
	$(UV) --no-deps liger-kernel
	touch $@

demo: $(INSTALLED)
	$(FAST) $(BIN)/expunge run --out runs/demo

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The tests of the report's page run in Debian's Chromium. Where it cannot be had they are skipped, and say so.
browser:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "no chromium here: the browser tests will be skipped (apt-get install chromium chromium-driver)"; exit 0; \
	fi; \
	echo "installing Debian's chromium for the browser tests"; \
	timeout 300 sh -c '$(APT) update; $(APT) install -y --no-install-recommends chromium chromium-driver' \
		>/dev/null 2>&1 || echo "chromium could not be installed: the browser tests will be skipped"

# Chromium comes beside the packages, and the linter, which has one thread, beside the tests: half as long as one by one.
test:
	@$(MAKE) --no-print-directory -j2 lint pytest || { echo "make test: failed; lint's errors stand above the tests'"; exit 1; }

# One process a core, and one thread in each: threads of two processes on one core wait for each other without end.
pytest: $(INSTALLED) browser
	$(FAST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile

clean:
	rm -rf $(VENV) runs build

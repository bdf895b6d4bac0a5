"""The arrows between the rooms, held by reading imports: who may import whom; no private names; no torch in the report.

Imports under `if TYPE_CHECKING:` are for the reader and the type checker; they do not count.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import expunge

PACKAGE = Path(expunge.__file__).parent
FACES = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}  # these may name anything
FILES = sorted(set(PACKAGE.rglob("*.py")) - FACES)

LEAVES = {"errors", "ranges", "registry", "config", "whole", "rows", "lines", "paths", "ids"}
MAY_IMPORT = {
    "errors": set(),
    "registry": {"errors"},
    "lines": {"errors"},
    "paths": {"errors"},
    "ids": {"errors"},
    "whole": {"errors"},
    "ranges": {"errors"},
    "rows": {"errors", "whole"},
    "claim": {"errors", "whole"},
    "config": {"errors", "registry", "lines", "paths", "ranges"},
    "provenance": LEAVES,
    "losses": set(),
    "adapters": LEAVES | {"claim"},
    "steering": LEAVES,
    "models": LEAVES | {"adapters", "steering"},
    "states": LEAVES | {"models"},
    "layout": set(),
    "engine": LEAVES | {"layout", "losses", "models"},
    "generation": LEAVES | {"models"},
    "probes": LEAVES | {"models"},
    "scorers": LEAVES | {"models"},
    "data": LEAVES | {"models", "generation", "scorers", "probes", "provenance"},
    "anatomy": LEAVES | {"models"},
    "folding": LEAVES | {"anatomy", "steering"},
    "methods": LEAVES | {"anatomy", "losses", "probes", "models", "steering"},
    "metrics": LEAVES | {"scorers", "generation", "models", "data"},
    "attacks": LEAVES
    | {"adapters", "anatomy", "engine", "generation", "losses", "metrics", "models", "probes", "provenance", "steering"}
    | {"data", "training"},
    "analyses": LEAVES | {"engine", "probes", "models", "data"},
    "callbacks": set(),
    "hub": {"errors"},
    "monitor": LEAVES | {"metrics", "scorers"},
    "training": LEAVES | {"callbacks", "engine", "methods", "models", "states", "data"},
    "fitting": LEAVES | {"data", "folding", "methods", "models", "training"},
    "estimate": LEAVES | {"training", "methods", "adapters", "anatomy", "models", "losses", "data"},
    "doctor": LEAVES | {"plan", "provenance", "estimate", "data", "models"},
    "machine": LEAVES | {"provenance"},
    "plan": LEAVES
    | {"adapters", "data", "harness", "hub", "methods", "metrics", "models", "monitor", "provenance", "scorers", "training"},
    "harness": LEAVES | {"provenance", "metrics", "models", "data"},
    "listing": LEAVES | {"attacks", "methods", "scorers", "data"},
    "report": LEAVES,
    "redteam": LEAVES | {"plan", "attacks", "data", "metrics", "models", "pipeline", "provenance", "report", "scorers"},
    "sweep": LEAVES | {"plan", "pipeline", "provenance", "redteam", "data", "harness", "models", "report"},
}
BUILDERS = {
    "data/builders.py",
    "data/harvest.py",
    "data/pplm.py",
    "data/pair_files.py",
}  # the only part of data that runs a model
HEAVY = {"torch", "transformers", "peft", "accelerate"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, str | None, ast.AST]]:
    """`(module, imported name or None, node)` of every import that runs, wherever it stands."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            yield child
            yield from walk(child)

    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            yield from ((node.module or "", alias.name, node) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None, node) for alias in node.names)


def rooms_of(module: str, name: str | None) -> str | None:
    """The room that `from module import name` enters; None for other packages."""
    if module != "expunge":
        return module.split(".")[1] if module.startswith("expunge.") else None
    faces = {"load_model": "models", "load_pairs": "data"}
    return faces.get(name or "", name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_what_its_room_may(path):
    room = room_of(path)
    if room == "cli":
        return
    for module, name, node in imports(path):
        entered = rooms_of(module, name)
        if entered is None or entered == room:
            continue
        place = f"{path.relative_to(PACKAGE)}:{node.lineno} imports {module}"
        assert entered not in ("cli", "__main__"), f"{place}: nobody imports the command line"
        if room == "pipeline":
            continue
        assert room in MAY_IMPORT, f"{path.name}: a new room; give it a line in this test and in the design"
        assert entered in MAY_IMPORT[room], f"{place}: {room} may import {sorted(MAY_IMPORT[room])}"
        if room == "data" and entered in ("models", "generation", "scorers", "probes", "provenance"):
            assert str(path.relative_to(PACKAGE)) in BUILDERS, f"{place}: only the builders run models"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_room_uses_the_private_names_of_another(path):
    room = room_of(path)
    modules = {}
    for module, name, node in imports(path):
        if not module.startswith("expunge") or rooms_of(module, name) == room:
            continue
        parts = [*module.split("."), name or ""]
        assert not any(part.startswith("_") for part in parts), f"{path.name}:{node.lineno}: private {module}.{name}"
        modules[name or module.split(".")[-1]] = module
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            assert not private, f"{path.name}:{node.lineno}: private {node.value.id}.{node.attr}"


def files_behind(module: str) -> set[Path]:
    """Every file of ours that importing `module` runs."""
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        parts = waiting.pop().split(".")[1:]
        for length in range(len(parts) + 1):
            base = PACKAGE.joinpath(*parts[:length])
            path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
            if path.is_file() and path not in found:
                found.add(path)
                for imported, name, _ in imports(path):
                    if imported.split(".")[0] == "expunge":
                        waiting += [imported, f"{imported}.{name}"]
    return found


@pytest.mark.parametrize("room", ["report", "report.compare", "rows", "config", "registry", "errors"])
def test_what_reads_files_only_never_imports_torch(room):
    behind = files_behind(f"expunge.{room}")
    assert len(behind) > 1
    for path in behind:
        for module, _, node in imports(path):
            place = f"{path.relative_to(PACKAGE)}:{node.lineno}"
            assert module.split(".")[0] not in HEAVY, f"{place}: {room} pulls in {module}"


def test_this_test_sees_a_forbidden_import(tmp_path):
    """The control: both forms of import are found, and those for the type checker are not."""
    path = tmp_path / "file.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from expunge.engine import Step\n"
        "def f():\n    import expunge.cli\n    from expunge.models import _load_adapter\n"
    )
    found = [(module, name) for module, name, _ in imports(path) if module.startswith("expunge")]
    assert found == [("expunge.cli", None), ("expunge.models", "_load_adapter")]
    assert PACKAGE / "models/reference.py" in files_behind("expunge.training")
    assert any(m == "torch" for p in files_behind("expunge.training") for m, _, _ in imports(p))

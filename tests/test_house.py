"""The house rules that a machine can check: the import ladder, file sizes, nothing heavy at start."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "mla"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# What is ours: beside it in a checkout may lie environments and builds.
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "src", "tests")
# A module imports only from levels below its own, or from its own folder.
LEVELS = {
    "budget": 0,
    "config": 0,
    "errors": 0,
    "families": 0,
    "formats": 0,
    "looks": 0,
    "machine": 0,
    "reading": 0,
    "textfile": 0,
    "whole": 0,
    "digest": 1,
    "ops": 1,
    "cache": 2,
    "nn": 3,
    "integrations": 4,
    "convert": 5,
    "plan": 5,
    "cli": 6,
    "__main__": 7,
}
WITHOUT_TORCH = {name for name, level in LEVELS.items() if level == 0} | {"plan"}


def place(path: Path) -> str:
    """The name under which a source file stands in LEVELS."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> list[str]:
    """Dotted names of everything a file imports, at any depth of nesting."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            assert node.module is not None
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_the_ladder(path):
    here = place(path)
    if here == "__init__":  # the package's face shows what lies below it
        return
    assert here in LEVELS, f"{here} has no level yet: give it one in LEVELS and in the design"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "mla" or len(parts) == 1 or parts[1] not in LEVELS:
            continue
        there = parts[1]
        # The files of level 0 lie in one folder, the package's own.
        below = there == here or LEVELS[there] < LEVELS[here] or LEVELS[here] == 0 == LEVELS[there]
        assert below, f"{here} imports {name}: not below it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_level_0_knows_no_torch(path):
    if place(path) in WITHOUT_TORCH:
        heavy = {"torch", "transformers", "numpy"}
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not heavy & {name.split(".")[0] for name in names}


def test_the_face_of_the_package_loads_lazily():
    code = "import sys, mla; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom mla.cli import main\nsys.argv = ['mla', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    sys.exit(end.code or 'torch' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "convert" in run.stdout


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for place in (ROOT.glob("*"), *((ROOT / folder).rglob("*") for folder in FOLDERS))
        for path in place
        if path.suffix in {".py", ".md", ".toml", ".cpp", ".h"}
    ),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_file_over_500_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500

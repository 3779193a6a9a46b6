"""Benchmarks run as `python benchmarks/NAME.py`: their folder comes first on the path, the checkout is not on it."""

import ast
import sys
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


def hides(folder: Path) -> list[str]:
    """Modules of the folder that take the place of an installed one, or of one of Python's own."""
    installed = [place for place in sys.path if place.endswith("-packages")]
    names = sorted(path.stem for path in folder.glob("*.py"))
    return [name for name in names if name in sys.stdlib_module_names or PathFinder.find_spec(name, installed)]


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_no_benchmark_hides_an_installed_module(tmp_path: Path) -> None:
    assert hides(BENCHMARKS) == []
    (tmp_path / "grpc.py").touch()
    (tmp_path / "queue.py").touch()
    assert hides(tmp_path) == ["grpc", "queue"]


def test_benchmarks_import_each_other_as_scripts_do() -> None:
    files = sorted(BENCHMARKS.rglob("*.py"))
    assert [path.name for path in files if imports(path) & {"benchmarks", "tests"}] == []
    assert [path.name for path in files if "common" in imports(path)]
    assert "-m benchmarks" not in (ROOT / "Makefile").read_text()

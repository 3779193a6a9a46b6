"""The map of the rooms holds: who imports whom, and what stays light."""

import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "daft", "pyarrow", "mlflow", "huggingface_hub")
PROBE = """
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
print("loaded:" + ",".join(name for name in {heavy!r} if name in sys.modules))
"""
HELP = """
import sys
from soma.cli import main
sys.argv = ["soma", "--help"]
try:
    main()
except SystemExit as over:
    assert not over.code, over.code
print("loaded:" + ",".join(name for name in {heavy!r} if name in sys.modules))
"""


def execute(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, check=False, timeout=120
    )


def heavy_after(program: str, path: Path = ROOT) -> str:
    """Run a program with `path` first on the module path; what it says that it has loaded."""
    result = execute([sys.executable, "-c", program], path)
    assert result.returncode == 0, result.stderr
    return result.stdout.rpartition("loaded:")[2].strip()


def loaded(modules: list[str], heavy: tuple[str, ...] = HEAVY, path: Path = ROOT) -> str:
    """Which of the heavy modules importing `modules` in a fresh interpreter loads."""
    return heavy_after(PROBE.format(modules=modules, heavy=heavy), path)


def modules_of(package: str) -> list[str]:
    folder = ROOT / package.replace(".", "/")
    return [package, *(info.name for info in pkgutil.walk_packages([str(folder)], f"{package}."))]


def packages() -> list[str]:
    found = (path.parent.relative_to(ROOT) for path in (ROOT / "soma").rglob("__init__.py"))
    return [".".join(folder.parts) for folder in sorted(found)]


def config_modules() -> list[str]:
    found = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "soma").rglob("config.py")]
    assert found
    return [".".join(path.parts) for path in sorted(found)]


def test_packages_and_recipe_are_light() -> None:
    assert loaded([*packages(), "soma.recipe", *config_modules()]) == ""


def test_help_is_light() -> None:
    assert heavy_after(HELP.format(heavy=HEAVY)) == ""


def test_base_is_light() -> None:
    assert loaded(modules_of("soma.base")) == ""


def test_data_loads_no_torch() -> None:
    assert loaded(modules_of("soma.data"), ("torch", "transformers", "mlflow")) == ""


def test_the_runner_loads_no_torch_before_a_stage_runs() -> None:
    assert loaded(["soma.run", "soma.stages.order"], ("torch", "transformers", "mlflow")) == ""


def test_a_heavy_import_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text("import torch\n")
    assert loaded(["planted"], path=tmp_path) == "torch"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("lint-imports", path=str(Path(sys.executable).parent)) or shutil.which("lint-imports")
    assert tool, "import-linter is not installed: pip install somacube[dev]"
    return execute([tool, "--no-cache", "--config", str(folder / ".importlinter")], folder)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources in which a test may plant something."""
    shutil.copytree(ROOT / "soma", tmp_path / "soma", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    return tmp_path


def test_contracts_hold() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


def test_planted_violations_break_their_contracts(checkout: Path) -> None:
    (checkout / "soma/serve/planted.py").write_text("def late() -> None:\n    import soma.train.config\n")
    (checkout / "soma/data/planted.py").write_text("import torch\n")
    (checkout / "soma/base/planted.py").write_text("import soma.model.config\nimport uvicorn\n")
    with (checkout / "soma/train/config.py").open("a") as config:
        config.write("\nimport daft\n")
    (checkout / "soma/model/planted.py").write_text("import transformers\n")
    result = lint(checkout)
    assert result.returncode == 1, result.stdout
    assert "6 broken" in result.stdout, result.stdout


def test_a_module_without_a_place_on_the_map_is_noticed(checkout: Path) -> None:
    (checkout / "soma/elsewhere.py").write_text("")
    result = lint(checkout)
    assert result.returncode == 1
    assert "elsewhere" in result.stdout

"""The Dockerfile and the compose file fit the repository. (That they build is seen where there is a Docker daemon.)"""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from soma.cli import app

ROOT = Path(__file__).resolve().parent.parent


def instructions(name: str) -> list[list[str]]:
    """The Dockerfile's instructions of one kind, as words."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [line[1:] for line in lines if line and line[0] == name]


def copied() -> list[str]:
    words = [[word for word in line if not word.startswith("--")] for line in instructions("COPY")]
    return [source for line in words for source in line[:-1]]


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


def test_what_is_copied_is_there_and_not_ignored() -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in rules
    assert len(copied()) >= 5
    for source in copied():
        assert (ROOT / source).exists(), source
        assert f"!{source}" in rules, source
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(copied())


def test_the_package_finds_its_files() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= set(copied())
    assert re.match(r">=3\.11", project["requires-python"])
    assert instructions("FROM") == [["python:3.11-slim"]]
    assert instructions("ENTRYPOINT") == [["[soma]"]]
    assert "soma" in project["scripts"]


def test_it_does_not_run_as_root() -> None:
    assert instructions("USER") == [["soma"]]


def test_compose_commands_are_ones_that_soma_knows(compose: Any) -> None:
    for name, service in compose["services"].items():
        command, *words = service["command"]
        result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert result.exit_code == 0, name
        for option in (word for word in words if word.startswith("--")):
            assert option in result.output, f"{name}: {command} has no {option}"
    assert (ROOT / compose["services"]["quickstart"]["command"][1]).is_file()


def test_compose_fits_the_image_and_the_service(compose: Any) -> None:
    assert [f"{port}" for line in instructions("EXPOSE") for port in line] == ["8000"]
    serve = compose["services"]["serve"]
    assert serve["ports"] == ["127.0.0.1:8000:8000"], "published on the loopback alone"
    assert "/health" in serve["healthcheck"]["test"][-1]
    compile(serve["healthcheck"]["test"][-1], "healthcheck", "exec")
    for service in compose["services"].values():
        names = {volume.split(":")[0] for volume in service["volumes"]}
        assert names <= compose["volumes"].keys()
        assert any(volume.split(":")[1] == "/work/runs" for volume in service["volumes"])

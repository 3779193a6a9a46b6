"""The catalogue: every block is a valid one, costs follow from sizes, the command prints what a recipe can take."""

import pytest
import yaml
from typer.testing import CliRunner

from soma.base.errors import UserError
from soma.cli import app
from soma.data import catalogue
from soma.data.config import DataConfig


@pytest.mark.parametrize("name", catalogue.CATALOGUE)
def test_every_block_is_one_that_a_recipe_takes(name: str) -> None:
    known = catalogue.find(name)
    config = DataConfig.model_validate(yaml.safe_load(catalogue.block(known))["data"])
    assert config.sources
    assert known.licence
    assert known.languages
    assert known.reference


def test_costs_follow_from_the_size() -> None:
    known = catalogue.Known("x", "X", "l", "e", "h", "r", text_gb=59.4, download_gb=45.0)
    cost = known.cost()
    assert cost == pytest.approx({"disk_gb": 45 + 1.7 * 59.4, "download_hours": 1.0, "read_hours": 5.0})
    four = known.cost(4)
    assert four is not None
    assert four["read_hours"] == pytest.approx(1.25)
    assert catalogue.find("oscar").cost() is None


def test_the_command() -> None:
    run = CliRunner().invoke(app, ["data", "catalogue"])
    assert run.exit_code == 0, run.output
    assert all(name in run.output for name in catalogue.CATALOGUE)
    run = CliRunner().invoke(app, ["data", "catalogue", "c4", "--cores", "8"])
    assert "ODC-BY" in run.output
    assert "8 cores" in run.output
    run = CliRunner().invoke(app, ["data", "catalogue", "stdlib", "--block"])
    assert yaml.safe_load(run.output) == {"data": {"sources": ["stdlib:"]}}
    with pytest.raises(UserError, match="did you mean c4"):
        catalogue.find("c44")

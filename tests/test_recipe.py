"""Recipes: what is understood, what is refused, and how a mistake is answered."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pydantic import BaseModel

from soma.base.errors import UserError
from soma.recipe import Recipe, _models_in, explain, json_schema, load, to_yaml

ROOT = Path(__file__).resolve().parent.parent
GOOD = """\
name: mine
data:
  sources: ./docs
tokenizer:
  vocab_size: 512
model: {hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 2}
train:
  steps: 100
"""


def write(tmp_path: Path, text: str, name: str = "r.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_of_the_repository_load(path: Path) -> None:
    assert load(path).name


def test_values_and_overrides(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, GOOD), ["train.steps=7", "data.sources=[a, b]", "train.learning_rate=1e-4", "seed=3"])
    assert recipe.train is not None
    assert recipe.data is not None
    assert (recipe.train.steps, recipe.train.learning_rate, recipe.seed) == (7, 1e-4, 3)
    assert recipe.data.sources == ["a", "b"]
    assert load(write(tmp_path, GOOD)).data.sources == ["./docs"]  # type: ignore[union-attr]


def test_extends_merges_blocks_and_null_removes(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    child = load(write(tmp_path, "extends: r.yaml\nname: child\ntrain: {steps: 5}\nevaluate: {}\n", "child.yaml"))
    assert child.name == "child"
    assert child.train is not None
    assert child.train.steps == 5
    assert child.model is not None
    assert child.model.hidden_size == 64
    bare = load(write(tmp_path, "extends: r.yaml\ntrain: null\nmodel: null\n", "bare.yaml"))
    assert bare.train is None


# Each mistake: text (or override) → what the answer must contain.
MISTAKES = {
    "unknown key": (GOOD.replace("steps", "stepz"), ["r.yaml:8", "train.stepz", "unknown key", "did you mean `steps`"]),
    "unknown block": (GOOD + "evalute: {}\n", ["r.yaml:9", "evalute", "did you mean `evaluate`"]),
    "wrong type": (GOOD.replace("100", "many"), ["r.yaml:8", "train.steps", "integer", "'many'"]),
    "out of range": (GOOD.replace("100", "-1"), ["r.yaml:8", "train.steps", "greater than or equal to 1"]),
    "missing name": (GOOD.replace("name: mine\n", ""), ["r.yaml", "name: missing"]),
    "missing field": (
        GOOD.replace("hidden_size: 64, ", ""),
        ["r.yaml:6", "model.hidden_size: missing", "residual stream"],
    ),
    "bad choice": (GOOD + "  optimizer: sgd\n", ["r.yaml:9", "train.optimizer", "'adamw' or 'muon'", "'sgd'"]),
    "block is a scalar": (GOOD.replace("train:\n  steps: 100", "train: 100"), ["r.yaml:7", "train"]),
    "key twice": (GOOD + "seed: 1\nseed: 2\n", ["r.yaml:10", "seed", "given twice"]),
    "broken yaml": ("name: [x\ntrain: {", ["r.yaml:", "not valid YAML"]),
    "empty": ("", ["r.yaml", "empty"]),
    "not a mapping": ("- a\n- b\n", ["r.yaml:1", "mapping"]),
    "needs a block": ("name: x\ndata: {sources: a}\ntrain: {steps: 1}\n", ["needs the blocks `tokenizer` and `model`"]),
    "extends nothing": ("extends: quickstar.yaml\n", ["quickstar.yaml", "no such recipe"]),
    "extends itself": ("extends: r.yaml\n", ["circle"]),
    "nothing held out": (
        GOOD.replace("./docs", "./docs\n  validation_fraction: 0") + "evaluate: {}\n",
        ["`evaluate`", "data.validation_fraction"],
    ),
    "longer than the context": (
        GOOD + "  sequence_length: 4096\n",
        ["train.sequence_length 4096", "model.max_position_embeddings 2048"],
    ),
    "bad name": (GOOD.replace("mine", "../evil"), ["r.yaml:1", "name"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered(mistake: str, tmp_path: Path) -> None:
    text, expected = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        load(write(tmp_path, text))
    for part in expected:
        assert part in str(error.value)


def test_every_mistake_is_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(write(tmp_path, GOOD.replace("steps: 100", "steps: x\n  batchsize: 2").replace("512", "a")))
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=3", ["--set train.stepz=3", "did you mean `steps`"]),
        ("train.steps", ["--set train.steps", "KEY=VALUE"]),
        ("train.steps=[", ["--set train.steps=[", "not valid YAML"]),
        ("data.sources.0=x", ["lists are replaced whole"]),
    ],
)
def test_bad_overrides(override: str, expected: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(write(tmp_path, GOOD), [override])
    for part in expected:
        assert part in str(error.value)


def test_missing_file_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean .*quickstart\.yaml"):
        load(ROOT / "recipes" / "quickstrat.yaml")


def test_shown_recipe_loads_again(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, GOOD))
    assert load(write(tmp_path, to_yaml(recipe), "again.yaml")) == recipe
    assert yaml.safe_load(to_yaml(recipe, only_set=False))["train"]["batch_size"] >= 1


def test_every_field_is_described() -> None:
    seen: set[type[BaseModel]] = set()

    def walk(model: type[BaseModel], path: str) -> None:
        if model in seen:
            return
        seen.add(model)
        for name, info in model.model_fields.items():
            assert info.description, f"{path}.{name} has no description"
            for inner in _models_in(info.annotation):
                walk(inner, f"{path}.{name}")

    walk(Recipe, "recipe")
    assert len(seen) > 8


def test_schema_is_json_and_knows_the_blocks() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert {"data", "tokenizer", "model", "train", "tune", "evaluate", "probe"} <= set(schema["properties"])
    assert schema["properties"]["seed"]["description"]


def test_registry_is_where_the_run_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from soma.base.registry import default_uri
    from soma.cli.recipes import _name_registry

    recipe = SimpleNamespace(tracking=SimpleNamespace(uri=None))
    for name in ("SOMA_RUNS", "SOMA_REGISTRY", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    _name_registry(recipe, tmp_path)
    assert default_uri() == f"sqlite:///{tmp_path / 'mlflow.db'}"
    recipe.tracking.uri = "http://mlflow.example:5000"
    _name_registry(recipe, tmp_path / "other")
    assert default_uri() == "http://mlflow.example:5000"
    recipe.tracking.uri = "http://ignored"
    _name_registry(recipe, tmp_path)
    assert default_uri() == "http://mlflow.example:5000"  # what the environment says stays


def test_explain() -> None:
    blocks = {one.key: one for one in explain()}
    assert blocks["train"].is_block
    assert blocks["name"].default == "required"
    inside = {one.key: one for one in explain("train")}
    assert "train" in inside
    assert "Optimizer steps" in inside["train.steps"].description
    assert inside["train.learning_rate"].type == "float"
    assert [one.key for one in explain("data.sources")] == ["data.sources"]
    for key, nearest in (("trian", "`train`"), ("train.stepz", "`train.steps`")):
        with pytest.raises(UserError, match=nearest):
            explain(key)
    with pytest.raises(UserError, match="it is a value"):
        explain("train.steps.x")


def test_short_options_of_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from soma.cli import recipes

    given: list[list[str]] = []
    monkeypatch.setattr("soma.recipe.load", lambda path, overrides: given.append(overrides))
    monkeypatch.setattr(recipes, "execute", lambda *arguments, **selection: None)
    recipes.run(Path("r.yaml"), ["seed=1"], runner="ray", workers=3)
    recipes.run(Path("r.yaml"))
    assert given == [["seed=1", "data.runner=ray", "data.workers=3"], []]

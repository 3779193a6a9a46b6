"""The recipe: one YAML file says what a run does. Typed, documented, and strict about mistakes.

`load(path, overrides)` reads the file, follows `extends:`, applies `--set` options and validates. Whatever is wrong is
answered with file, line, key, what was expected and the nearest valid key. Loads no torch.
"""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from soma.base.errors import UserError
from soma.data.config import DataConfig, InstructConfig, MixturePart, TokenizerConfig
from soma.evaluate.config import EvaluateConfig
from soma.model.config import ModelConfig
from soma.model.tokenizer import Tokenizer
from soma.train.config import PreferenceConfig, TrainConfig, TuneConfig

Key = tuple[str | int, ...]


class Strict(BaseModel):
    """A block of the recipe: unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelShape(ModelConfig):
    """The shape of a model to train. `vocab_size` comes from the tokenizer that the run trains."""

    vocab_size: int | None = Field(  # type: ignore[assignment]
        None, description="Rows of the embedding. Left out, it is what the trained tokenizer has, rounded up to 64."
    )

    def with_tokenizer(self, tokenizer: Tokenizer) -> ModelConfig:
        """The full config for a tokenizer: as many rows as it has entries, rounded up to a multiple of 64, and its ids.

        Raises UserError if the recipe asks for fewer rows than the tokenizer has entries.
        """
        entries = tokenizer.vocab_size
        if self.vocab_size is not None and self.vocab_size < entries:
            raise UserError(f"model.vocab_size is {self.vocab_size}, but the tokenizer has {entries} entries")
        values = {"vocab_size": -(-entries // 64) * 64} | self.model_dump(exclude_unset=True, exclude_none=True)
        return ModelConfig(**values)


class ProbeConfig(Strict):
    """Real requests sent through the openai client to the finished model's own service."""

    prompts: list[str] = Field(
        ["Hello!"], min_length=1, description="One request each: user messages where the model chats, else texts."
    )
    max_tokens: int = Field(96, ge=1, description="Longest answer in tokens.")
    temperature: float = Field(0.0, ge=0, le=2, description="0 is greedy.")
    concurrency: int = Field(1, ge=1, le=64, description="Requests in flight at once.")


class TrackingConfig(Strict):
    """Where parameters, metrics and the finished model are recorded with MLflow."""

    enabled: bool = Field(True, description="False records nothing with MLflow; the run's own files stay.")
    uri: str | None = Field(
        None,
        description="MLflow tracking URI. Left out: SQLite in the runs folder, or MLFLOW_TRACKING_URI if it is set.",
    )
    register_as: str | None = Field(
        None,
        description="Name in the model registry. Left out, the recipe's name. `registry:NAME@VERSION` finds it again.",
    )


class Recipe(Strict):
    """A run of Soma, from sources to a measured, served model. A stage runs when its block is there."""

    name: str = Field(
        description="Name of the run; its results lie in runs/NAME.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
    )
    description: str = Field("", description="One line for people; it changes nothing.")
    extends: str | None = Field(
        None, description="Another recipe (path relative to this one) whose values this one overrides."
    )
    seed: int = Field(0, ge=0, description="Seed of every stage that does not name its own.")
    base: str | None = Field(
        None, description="Start from this model (folder, hf:ID, registry:NAME@VERSION), not from random weights."
    )
    data: DataConfig | None = Field(None, description="Text sources, cleaning, deduplication, split.")
    tokenizer: TokenizerConfig | None = Field(
        None, description="The tokenizer to train; with `base`, the base model's is used."
    )
    model: ModelShape | None = Field(
        None, description="The shape of the model to train; with `base`, the base model's is used."
    )
    mixture: list[MixturePart] | None = Field(
        None, min_length=1, description="Corpora that `train` takes together, by weights and epochs; else `data` alone."
    )
    train: TrainConfig | None = Field(None, description="Pretraining (or, with `base`, further pretraining) on `data`.")
    instruct: InstructConfig | None = Field(
        None, description="Instruction pairs for `tune`: from files, or made from `data`."
    )
    tune: TuneConfig | None = Field(None, description="Instruction tuning on `instruct`; loss on the answers only.")
    preferences: InstructConfig | None = Field(
        None, description="Preference pairs (prompt, chosen, rejected) for `prefer`."
    )
    prefer: PreferenceConfig | None = Field(None, description="Preference tuning (DPO) on `preferences`.")
    evaluate: EvaluateConfig | None = Field(None, description="Held-out bits per byte, perplexity, samples, answers.")
    probe: ProbeConfig | None = Field(None, description="Start the service on the result and send it real requests.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow.")

    @model_validator(mode="after")
    def blocks_fit(self) -> "Recipe":
        """Each block has the blocks that it needs."""
        if self.base is not None and (self.model is not None or self.tokenizer is not None):
            raise ValueError("`base` brings its own model and tokenizer: remove the blocks `model` and `tokenizer`")
        for block, needs in (
            ("tokenizer", ["data"]),
            ("train", ["data"] if self.mixture is None else []),
            ("tune", ["instruct"]),
            ("prefer", ["preferences"]),
        ):
            missing = [need for need in needs if getattr(self, need) is None]
            if getattr(self, block) is not None and missing:
                raise ValueError(f"`{block}` needs the block `{missing[0]}`")
        if self.mixture is not None:
            names = [part.name for part in self.mixture]
            if self.train is None:
                raise ValueError("`mixture` is what `train` takes: add the block `train`")
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"two parts of `mixture` are named {twice[0]}")
            for part in self.mixture:
                if part.data is None and part.tokens is None and self.data is None:
                    raise ValueError(f"mixture: {part.name} needs `data`, `tokens`, or the recipe's block `data`")
        if self.train is not None and self.base is None and (self.model is None or self.tokenizer is None):
            raise ValueError("`train` needs the blocks `tokenizer` and `model`, or a `base` model to start from")
        for block in ("tune", "prefer", "evaluate", "probe"):
            if getattr(self, block) is not None and self.train is None and self.base is None:
                raise ValueError(f"`{block}` needs a model: add a `train` block or a `base` model")
        if self.evaluate is not None and self.data is None and self.tune is None and self.prefer is None:
            raise ValueError(
                "`evaluate` needs the block `data`, whose validation split is measured, or `tune` or `prefer`, whose "
                "held-out answers are"
            )
        if self.evaluate is not None and self.data is not None and self.data.validation_fraction == 0:
            raise ValueError(
                "`evaluate` measures the validation split of `data`: raise data.validation_fraction above 0, or "
                "take the block `evaluate` away"
            )
        if self.model is not None:
            for block in ("train", "tune", "prefer"):
                config: TrainConfig | None = getattr(self, block)
                if config is not None and config.sequence_length > self.model.max_position_embeddings:
                    raise ValueError(
                        f"{block}.sequence_length {config.sequence_length} is more than model.max_position_embeddings "
                        f"{self.model.max_position_embeddings}: lower the one or raise the other"
                    )
        return self


# --- Reading YAML with the place of every key ---


@dataclass
class Source:
    """Values read from YAML, and for each key path the file and line (counted from 1) that it came from."""

    values: dict[str, Any]
    places: dict[Key, str] = field(default_factory=dict)

    def place(self, key: Key) -> str:
        """`file:line` of the key, or of the nearest parent that was written down."""
        while key not in self.places and key:
            key = key[:-1]
        return self.places.get(key, "")


def read_source(path: Path) -> Source:
    """Read one YAML file. Raises UserError with file and line for a missing file, broken YAML, or a key given twice."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe{_nearest_file(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name the recipe's YAML file{_nearest_file(path / 'x.yaml')}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if node is None:
        raise UserError(f"{path}: empty; a recipe is a mapping of keys to values")
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:{node.start_mark.line + 1}: expected a mapping of keys to values")
    source = Source({})
    source.values = _value(loader, node, (), path, source.places)
    return source


def _value(loader: yaml.SafeLoader, node: yaml.Node, key: Key, path: Path, places: dict[Key, str]) -> Any:
    """Python value of a YAML node; notes the place of each key below it."""
    places.setdefault(key, f"{path}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name = str(key_node.value)
            here = f"{path}:{key_node.start_mark.line + 1}"
            if name in mapping:
                raise UserError(f"{here}: {dotted((*key, name))}: given twice; remove one")
            places[(*key, name)] = here
            mapping[name] = _value(loader, value_node, (*key, name), path, places)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, (*key, index), path, places) for index, item in enumerate(node.value)]
    return loader.construct_object(node)


def _nearest_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    names = sorted(str(found) for found in folder.glob("*.yaml")) if folder.is_dir() else []
    close = difflib.get_close_matches(str(folder / path.name), names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(names)}" if names else ""


def merge(base: Source, top: Source) -> Source:
    """`top` over `base`: mappings merge key by key, anything else (lists too) replaces. `null` takes a block away."""

    def both(low: Any, high: Any, key: Key) -> Any:
        if isinstance(low, dict) and isinstance(high, dict):
            merged = dict(low)
            for name, value in high.items():
                merged[name] = both(low[name], value, (*key, name)) if name in low else value
            return merged
        for stale in [place for place in places if place[: len(key)] == key]:
            del places[stale]
        return high

    places = dict(base.places)
    values = both(base.values, top.values, ())
    places.update(top.places)
    return Source(values, places)


def read_extended(path: Path, seen: tuple[Path, ...] = ()) -> Source:
    """A recipe file with everything that it extends merged below it."""
    resolved = path.resolve()
    if resolved in seen:
        chain = " → ".join(str(item.name) for item in (*seen, resolved))
        raise UserError(f"{path}: `extends` goes round in a circle: {chain}")
    source = read_source(path)
    parent = source.values.get("extends")
    if parent is None:
        return source
    if not isinstance(parent, str):
        raise UserError(f"{source.place(('extends',))}: extends: expected the path of another recipe")
    return merge(read_extended(path.parent / parent, (*seen, resolved)), source)


def read_overrides(options: Sequence[str]) -> Source:
    """`--set a.b=c` options as a source. The value is YAML: `3`, `true`, `[a, b]`, `null`, or plain text."""
    source = Source({})
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or not all(name.split(".")):
            raise UserError(f"--set {option}: expected KEY=VALUE, for example --set train.steps=200")
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError:
            raise UserError(f"--set {option}: the value is not valid YAML; quote it") from None
        keys: Key = tuple(int(part) if part.isdigit() else part for part in name.split("."))
        if any(isinstance(part, int) for part in keys):
            raise UserError(f"--set {option}: lists are replaced whole: --set {name.split('.')[0]}…=[a, b]")
        parsed: dict[str, Any] = {}
        level = parsed
        for part in keys[:-1]:
            level = level.setdefault(str(part), {})
        level[str(keys[-1])] = value
        places: dict[Key, str] = {keys[: depth + 1]: f"--set {option}" for depth in range(len(keys))}
        source = merge(source, Source(parsed, places))
    return source


# --- Validation ---


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The validated recipe of a YAML file with `--set` options over it. Raises UserError with file, line and key."""
    return validate(merge(read_extended(path), read_overrides(overrides)))


def validate(source: Source) -> Recipe:
    """Check a source against the schema. Raises one UserError that lists every mistake."""
    try:
        return Recipe.model_validate(source.values)
    except ValidationError as error:
        lines = [_explain(detail, source) for detail in error.errors()]
        raise UserError("\n".join(dict.fromkeys(lines))) from None


def _explain(detail: Mapping[str, Any], source: Source) -> str:
    """One mistake: place, key, what was expected, the nearest valid key."""
    location: Key = tuple(detail["loc"])
    key = _written_key(location, source.values)
    prefix = f"{source.place(key)}: " if source.place(key) else ""
    name = f"{dotted(key)}: " if key else ""
    if detail["type"] == "extra_forbidden":
        valid = field_names(key[:-1])
        close = difflib.get_close_matches(str(key[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean `{close[0]}`? " if close else ""
        return f"{prefix}{name}unknown key; {hint}Valid here: {', '.join(valid)}"
    if detail["type"] == "missing":
        return f"{prefix}{name}missing; {_description(key) or 'it is required'}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    given = detail.get("input")
    got = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
    about = _description(key)
    return f"{prefix}{name}{message[:1].lower() + message[1:]}{got}" + (f". {about}" if about else "")


def _written_key(location: Key, values: Any) -> Key:
    """pydantic's location without the names of union branches that it puts between the keys."""
    key: list[str | int] = []
    level = values
    for index, part in enumerate(location):
        in_mapping = isinstance(level, dict) and part in level
        in_list = isinstance(level, list) and isinstance(part, int) and part < len(level)
        if in_mapping or in_list:
            key.append(part)
            level = level[part]
        elif isinstance(level, dict) and index == len(location) - 1:
            key.append(part)  # a missing key
    return tuple(key)


def dotted(key: Key) -> str:
    """`("data", "sources", 0)` → `data.sources.0`."""
    return ".".join(str(part) for part in key)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated, list, dict):
        return [model for part in typing.get_args(annotation) for model in _models_in(part)]
    return []


def _models_at(key: Key) -> list[type[BaseModel]]:
    """The pydantic models that a key path can lead to."""
    models: list[type[BaseModel]] = [Recipe]
    for part in key:
        if isinstance(part, int):
            continue
        found = [_models_in(model.model_fields[part].annotation) for model in models if part in model.model_fields]
        models = [model for group in found for model in group]
    return models


def field_names(key: Key = ()) -> list[str]:
    """Valid keys of the block at `key`, sorted."""
    return sorted({name for model in _models_at(key) for name in model.model_fields})


def _description(key: Key) -> str:
    for model in _models_at(key[:-1]) if key else []:
        if key[-1] in model.model_fields:
            return model.model_fields[str(key[-1])].description or ""
    return ""


# --- For people and editors ---


@dataclass(frozen=True)
class FieldFacts:
    """A field as `soma recipe explain` shows it."""

    key: str
    type: str
    default: str
    description: str
    is_block: bool


def explain(key: str = "") -> list[FieldFacts]:
    """The field `key` with everything in it; of an empty key, the blocks. Raises UserError with the nearest key."""
    parts: Key = tuple(key.split(".")) if key else ()
    for depth, part in enumerate(parts):
        valid = field_names(parts[:depth])
        if part not in valid:
            close = difflib.get_close_matches(str(part), valid, n=1, cutoff=0.5)
            hint = f"did you mean `{dotted((*parts[:depth], close[0]))}`? " if close else ""
            raise UserError(f"{key}: no such key; {hint}Valid here: {', '.join(valid) or 'nothing, it is a value'}")
    inside = field_names(parts) if parts else sorted(Recipe.model_fields)
    facts = {name: _facts((*parts, name)) for name in inside}
    return ([_facts(parts)] if parts else []) + list(facts.values())


def _facts(key: Key) -> FieldFacts:
    model = next(model for model in _models_at(key[:-1]) if key[-1] in model.model_fields)
    info = model.model_fields[str(key[-1])]
    default = "required" if info.is_required() else repr(info.get_default(call_default_factory=True))
    annotation = info.annotation.__name__ if isinstance(info.annotation, type) else str(info.annotation)
    if is_block := bool(_models_in(info.annotation)):
        default = "required" if info.is_required() else ""
        annotation = "block"
    shown = annotation.replace("typing.", "").replace("NoneType", "None")
    return FieldFacts(dotted(key), shown, default, info.description or "", is_block)


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Soma recipe"
    # A file that extends another may leave out anything, its name too.
    schema["anyOf"] = [{"required": ["name"]}, {"required": ["extends"]}]
    schema.pop("required", None)
    return schema


def to_yaml(recipe: Recipe, *, only_set: bool = True) -> str:
    """The recipe as YAML: what was written down, or with `only_set=False` every default too."""
    values = recipe.model_dump(mode="json", exclude_unset=only_set)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Text of several lines is written in double quotes, with its line ends as escapes."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_Dumper.add_representer(str, _text)

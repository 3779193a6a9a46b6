"""Files of settings: YAML, checked against a class, with the place of every mistake."""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from soma.base.errors import UserError

T = TypeVar("T", bound=BaseModel)


def read_as(kind: type[T], path: Path) -> T:
    """The file as `kind`. Raises UserError that names the file and the place of every mistake."""
    return validated(kind, read_yaml(path), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: no YAML: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected keys and values, found {type(value).__name__}")
    return value


def validated(kind: type[T], value: Any, where: str) -> T:
    """The value as `kind`. Raises UserError that names the place of every mistake."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """Every mistake with the place where it is."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(
        f"{'.'.join(map(str, each['loc'])) or 'the file'}: {each['msg'].removeprefix('Value error, ')}"
        for each in found
    )

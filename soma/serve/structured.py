"""From the fields of a request to what its answer must look like: OpenAI's `response_format`, and vLLM's fields."""

from typing import Any

from soma.engine.guided import Guided
from soma.serve.errors import ApiError

KINDS = ("json", "regex", "choice", "grammar", "json_object")  # in structured_outputs
ANY_OBJECT = {"type": "object"}


def guided_of(fields: dict[str, Any]) -> Guided | None:
    """What `response_format`, `structured_outputs` or one of vLLM's older `guided_*` fields asks for.

    fields: those of the request, by name; None where they are not given. Raises ApiError: not one of the known forms,
    or more than one of them.
    """
    found: list[Guided] = []
    if (given := fields.get("response_format")) is not None:
        found += _response_format(given)
    if (given := fields.get("structured_outputs")) is not None:
        wanted = {kind: value for kind, value in given.items() if value is not None and value is not False}
        if unknown := [kind for kind in wanted if kind not in KINDS]:
            raise ApiError(400, f"structured_outputs.{unknown[0]} is not supported; there are {', '.join(KINDS)}",
                           "structured_outputs")  # fmt: skip
        found += [make(kind, value, "structured_outputs") for kind, value in wanted.items()]
    for kind in KINDS[:4]:
        name = f"guided_{kind}"
        if (given := fields.get(name)) is not None:
            found.append(make(kind, given, name))
    if len(found) > 1:
        raise ApiError(400, f"{found[1].param}: an answer can be held to one form only", found[1].param)
    return found[0] if found else None


def _response_format(given: dict[str, Any]) -> list[Guided]:
    kind = given.get("type")
    if kind == "text":
        return []
    if kind == "json_object":
        return [make("json", ANY_OBJECT, "response_format")]
    if kind != "json_schema":
        raise ApiError(400, f"response_format.type must be text, json_object or json_schema, got {kind!r}",
                       "response_format")  # fmt: skip
    described = given.get("json_schema")
    if not isinstance(described, dict) or not isinstance(described.get("schema"), dict):
        raise ApiError(400, "response_format.json_schema.schema must be an object", "response_format")
    return [make("json", described["schema"], "response_format")]


def make(kind: str, value: Any, param: str) -> Guided:
    """A `Guided` of one kind. Raises ApiError for a value of the wrong type."""
    match kind, value:
        case "json_object", True:
            return Guided.json_schema(ANY_OBJECT).named(param)
        case "json", str() | dict():
            return Guided.json_schema(value).named(param)
        case "regex", str():
            return Guided.regex(value).named(param)
        case "grammar", str():
            return Guided.grammar(value).named(param)
        case "choice", list() if value and all(isinstance(text, str) and text for text in value):
            return Guided.choice(value).named(param)
    raise ApiError(400, f"{param}: that is no {kind}", param)

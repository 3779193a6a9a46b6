"""Features looked up at a Feast feature server: by a node of a graph, or once from the command line."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
import orjson

from soma.base.errors import UserError
from soma.serve.errors import ApiError
from soma.serve.features.config import Lookup, name_of
from soma.serve.graphs.remote import Endpoint, unreadable
from soma.serve.templates.template import ENVIRONMENT
from soma.serve.v2.datatypes import Tensors, as_objects, from_json
from soma.serve.v2.model import Job, Once, Options, TensorSpec, V2Model

TIMEOUT = 10.0  # seconds for a lookup
PATH = "/get-online-features"
PRESENT = "PRESENT"  # the other statuses are NOT_FOUND, NULL_VALUE, OUTSIDE_MAX_AGE


async def look_up(
    endpoint: Endpoint, keys: Mapping[str, Sequence[Any]], features: Sequence[str], timeout: float | None = TIMEOUT
) -> list[list[Any]]:
    """Values [features][entities], None where there is none, or one whose time is over. Raises ApiError."""
    body = orjson.dumps({"entities": keys, "features": features, "full_feature_names": True})
    async with endpoint.ask("POST", PATH, body, {"Content-Type": "application/json"}, timeout) as answer:
        data = await answer.read()
    try:
        said = orjson.loads(data)
        names, columns = said["metadata"]["feature_names"], said["results"]
        found = dict(zip(names, columns, strict=True))
        return [
            [value if status == PRESENT else None
             for value, status in zip(column["values"], column["statuses"], strict=True)]
            for column in (found[reference.replace(":", "__", 1)] for reference in features)
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise unreadable() from error


def look_up_once(url: str, keys: Mapping[str, Any], features: Sequence[str]) -> dict[str, Any]:
    """The features of one entity; null where there is none. Raises UserError."""

    async def once() -> list[list[Any]]:
        endpoint = Endpoint(url, None)
        try:
            return await look_up(endpoint, {name: [value] for name, value in keys.items()}, features)
        finally:
            if endpoint.session is not None:
                await endpoint.session.close()

    try:
        values = asyncio.run(once())
    except ApiError as error:
        raise UserError(f"{url}: {error.message}") from None
    return {reference: value[0] for reference, value in zip(features, values, strict=True)}


class FeatureLookup(V2Model):
    """The node: keys in, features and texts out, one element for each entity. Raises UserError: a template is wrong."""

    platform = "soma_feast"

    def __init__(self, lookup: Lookup) -> None:
        self.lookup, self.endpoint = lookup, Endpoint(lookup.url, lookup.key_env)
        self.inputs = [TensorSpec(name, datatype, (-1,)) for name, datatype in lookup.entities.items()]
        self.outputs = [TensorSpec(name_of(each), datatype, (-1,)) for each, datatype in lookup.get.items()]
        self.outputs += [TensorSpec(name, "BYTES", (-1,)) for name in lookup.fill]
        try:
            self.texts = {name: ENVIRONMENT.from_string(source) for name, source in lookup.fill.items()}
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"features.fill, line {error.lineno}: {error.message}") from None

    async def infer(self, tensors: Tensors, parameters: Mapping[str, Any]) -> Tensors:
        """The features. Raises ApiError: 404 one is not there and has no default, 502 and 503 the server's."""
        return await self.answer(tensors, TIMEOUT)

    async def job(self, tensors: Tensors, options: Options) -> Job:
        limit = TIMEOUT if options.timeout is None else min(options.timeout, TIMEOUT)
        return Once(lambda: self.answer(tensors, limit), options.timeout)

    async def answer(self, tensors: Tensors, timeout: float) -> Tensors:
        """One request to the server for all entities."""
        keys = {name: plain(tensors[name], name) for name in self.lookup.entities}
        if len(sizes := {len(values) for values in keys.values()}) != 1:
            raise ApiError(400, f"{', '.join(keys)}: not as many of each ({sorted(sizes)})")
        columns = await look_up(self.endpoint, keys, list(self.lookup.get), timeout)
        known: dict[str, list[Any]] = dict(keys)
        made: dict[str, np.ndarray] = {}
        for (reference, datatype), values in zip(self.lookup.get.items(), columns, strict=True):
            name = name_of(reference)
            if None in values and reference not in self.lookup.defaults:
                raise ApiError(404, f"the feature store has no {reference} for this entity", name, "feature_not_found")
            known[name] = [self.lookup.defaults[reference] if value is None else value for value in values]
            try:
                made[name] = from_json(known[name], datatype, (len(values),), name)
            except ApiError as error:
                raise ApiError(502, f"the feature store's {reference} is no {datatype}") from error
        rows = [dict(zip(known, row, strict=True)) for row in zip(*known.values(), strict=True)]
        for name, template in self.texts.items():
            texts = [filled(name, template, row) for row in rows]
            made[name] = as_objects([text.encode() for text in texts], (len(texts),))
        return made

    def close(self) -> None:
        self.endpoint.close()


def filled(name: str, template: jinja2.Template, row: Mapping[str, Any]) -> str:
    """A text of `fill`. Raises ApiError."""
    try:
        return template.render(row)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise ApiError(500, f"features.fill.{name}: the template fails ({type(error).__name__})") from error


def plain(array: np.ndarray, name: str) -> list[Any]:
    """A tensor's elements for JSON. Raises ApiError for bytes that are no UTF-8."""
    try:
        return [each.decode() if isinstance(each, bytes) else each.item() for each in array.ravel()]
    except UnicodeDecodeError:
        raise ApiError(400, f"{name} is no UTF-8", name) from None

"""`soma adapt MODEL DATA`: the recipe that goes on from a finished model with one's own text, pairs or preferences."""

from collections.abc import Sequence
from typing import Any, Literal

from soma.data.instruct.checks import RowError
from soma.data.instruct.schemas import schema_of
from soma.data.readers import READ_ERRORS, Dropped, decompress, json_rows
from soma.data.sources import Item, list_items
from soma.recipe import Recipe, Source, merge, read_overrides, validate

Kind = Literal["text", "instruct", "preference"]

# What each kind of data is learned by; the blocks' own defaults are the settings.
BLOCKS: dict[Kind, tuple[str, dict[str, Any]]] = {
    "text": ("data", {"train": {"learning_rate": 2e-4}, "evaluate": {}}),
    "instruct": ("instruct", {"tune": {}, "evaluate": {}}),
    "preference": ("preferences", {"prefer": {}, "evaluate": {}}),
}


def adapt_recipe(name: str, model: str, data: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of one adaptation: `base: MODEL`, DATA as text, instruction pairs or preference pairs, by its rows.

    Raises UserError for data that is not there, and for overrides that do not fit.
    """
    source_block, stages = BLOCKS[data_kind(data)]
    values = {"name": name, "base": model, source_block: {"sources": [data]}, **stages}
    return validate(merge(Source(values), read_overrides(overrides)))


def data_kind(data: str) -> Kind:
    """What the first JSON row of the data is; "text" where there is none, or its fields are no known shape."""
    for item in list_items([data]):
        if not isinstance(item, Item) or item.kind != "jsonl":
            continue
        try:
            with item.open() as raw:
                for _, row in json_rows(item, decompress(raw, item.compression)):
                    if isinstance(row, Dropped) or not isinstance(row, dict):
                        continue
                    return "preference" if schema_of(row) == "preference" else "instruct"
        except (*READ_ERRORS, RowError):
            return "text"
    return "text"

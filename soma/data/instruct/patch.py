"""The difference between two JSON values, as a list of changes that can be put into a row.

A change is `{"path": [key or index, …], "value": …, "was": hash}`: without `value` the place is taken out, without
`was` there was nothing before. `was` is checked when the change is applied, so that a patch never undoes an edit that
somebody made in between. Lists of different lengths are replaced whole.
"""

import copy
import hashlib
import json
from typing import Any

Path = tuple[str | int, ...]
Patch = list[dict[str, Any]]


class PatchError(ValueError):
    """The place that is not as the patch found it: `path` as `messages[2].content`."""

    def __init__(self, path: list[str | int]) -> None:
        self.path = spelled(path)
        super().__init__(f"{self.path} is not what it was")


def spelled(path: list[str | int]) -> str:
    """`["messages", 2, "content"]` → `messages[2].content`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def same(left: Any, right: Any) -> bool:
    """Equal as JSON: 1, 1.0 and true are three values, NaN equals itself, the order of keys does not count."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def difference(old: Any, new: Any, path: Path = ()) -> Patch:
    """The changes that make `new` of `old`. Both are objects at the top."""
    if isinstance(old, dict) and isinstance(new, dict):
        changes = [_change((*path, key), old[key]) for key in sorted(old) if key not in new]
        for key in sorted(new):  # sorted: the same patch for any order of the keys
            if key in old:
                changes += difference(old[key], new[key], (*path, key))
            else:
                changes.append({"path": [*path, key], "value": new[key]})
        return changes
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [change for index, (a, b) in pairs for change in difference(a, b, (*path, index))]
    return [] if same(old, new) else [_change(path, old) | {"value": new}]


def apply(patch: Patch, old: Any) -> Any:
    """`old` with the changes; the argument stays as it is. Raises PatchError where it is not what the patch expects."""
    root = {"": copy.deepcopy(old)}
    for change in patch:
        steps = ["", *change["path"]]
        place: Any = root
        for step in steps[:-1]:
            if not _there(place, step):
                raise PatchError(change["path"])
            place = place[step]
        last = steps[-1]
        expected = change.get("was")
        if not isinstance(place, dict | list) or (_digest(place[last]) if _there(place, last) else None) != expected:
            raise PatchError(change["path"])
        if "value" in change:
            place[last] = copy.deepcopy(change["value"])
        else:
            del place[last]
    return root[""]


def _there(place: Any, step: str | int) -> bool:
    if isinstance(place, dict):
        return step in place
    return isinstance(place, list) and isinstance(step, int) and step < len(place)


def _change(path: Path, old: Any) -> dict[str, Any]:
    return {"path": list(path), "was": _digest(old)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]

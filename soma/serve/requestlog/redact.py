"""Personal data and secrets out of rows, by the finders of the data room and the form of our own keys."""

import json
import re
from typing import Any

from soma.data.signals.personal import mask

OWN_KEY = re.compile(r"\bsoma_[0-9a-f]{10}_[A-Za-z0-9_-]{43}", re.ASCII)
COLUMNS = ("prompt", "completion", "correction", "comment")  # texts; `messages` is JSON


def redacted(row: dict[str, Any]) -> dict[str, Any]:
    """The row with what was found replaced by its kind, `redactions` says how often."""
    found = Counter()
    made = {name: found.text(value) if name in COLUMNS else value for name, value in row.items()}
    if row.get("messages") is not None:
        made["messages"] = json.dumps(found.value(json.loads(row["messages"])), ensure_ascii=False)
    return {**made, "redactions": found.count}


class Counter:
    """Masks texts and counts."""

    def __init__(self) -> None:
        self.count = 0

    def text(self, text: str | None) -> str | None:
        """One text."""
        if text is None:
            return None
        text, own = OWN_KEY.subn("<secret>", text)
        text, kinds = mask(text)
        self.count += own + kinds.total()
        return text

    def value(self, value: Any) -> Any:
        """All texts in a JSON value."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.value(each) for each in value]
        if isinstance(value, dict):
            return {key: self.value(each) for key, each in value.items()}
        return value

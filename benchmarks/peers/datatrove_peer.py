"""datatrove's filters on a JSONL file of {"id", "text"}: decisions to a file, seconds to standard output.

    python datatrove_peer.py TEXTS.jsonl OUT.json ROUNDS

Runs in the peers' environment. `OUT.json`: {filter: {id: reason or null}}. The first line printed is the seconds of a
process that has just loaded spaCy (its memory of words empty), the following those of later rounds.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils.text import split_into_parts, split_into_words


def main(texts: str, out: str, rounds: str) -> None:
    documents = [Document(**json.loads(line)) for line in Path(texts).read_text().splitlines()]
    filters = {
        "gopher_quality": GopherQualityFilter(), "gopher_repetition": GopherRepetitionFilter(),
        "c4": C4QualityFilter(), "fineweb": FineWebQualityFilter(),
    }  # fmt: skip
    split_into_words("Load the tokenizer.")
    for _ in range(int(rounds)):
        found: dict[str, dict[str, str | None]] = {name: {} for name in filters}
        started = time.perf_counter()
        for document in documents:
            for name, one in filters.items():  # one after the other, so that its memory of the last words is of use
                result = one.filter(replace(document))  # C4 changes the text of the document that it is given
                found[name][document.id] = result[1] if isinstance(result, tuple) else None
        print(time.perf_counter() - started, flush=True)
        split_into_parts.cache_clear()
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

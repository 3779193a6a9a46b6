"""datatrove's filters on a JSONL file of {"id", "text"}; runs in the peers' environment.

    python datatrove_peer.py TEXTS.jsonl

Answers each line of standard input with a line of JSON: the first when it is ready, the others after filtering all
documents: {"seconds", "decisions": {filter: {id: reason or null}}}.
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


def main(texts: str) -> None:
    documents = [Document(**json.loads(line)) for line in Path(texts).read_text().split("\n") if line]
    filters = {
        "gopher_quality": GopherQualityFilter(), "gopher_repetition": GopherRepetitionFilter(),
        "c4": C4QualityFilter(), "fineweb": FineWebQualityFilter(),
    }  # fmt: skip
    split_into_words("Load the tokenizer.")
    for number, _ in enumerate(sys.stdin):
        found: dict[str, dict[str, str | None]] = {name: {} for name in filters}
        started = time.perf_counter()
        for document in documents if number else []:
            for name, one in filters.items():  # one after the other: its memory of the last five texts is of use
                result = one.filter(replace(document))  # C4 changes the text of the document that it is given
                found[name][document.id] = result[1] if isinstance(result, tuple) else None
        print(json.dumps({"seconds": time.perf_counter() - started, "decisions": found}), flush=True)
        split_into_parts.cache_clear()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""trafilatura on pages: answers each line of standard input with {"seconds", "texts"}; runs in the peers' environment.

    python trafilatura_peer.py PAGES.jsonl        each line {"html"}

Settings are its defaults with tables and without comments: what a corpus is made with.
"""

import json
import logging
import sys
import time
from pathlib import Path

import trafilatura


def main(pages: str) -> None:
    logging.disable(logging.CRITICAL)
    htmls = [json.loads(line)["html"] for line in Path(pages).read_text().split("\n") if line]
    for number, _ in enumerate(sys.stdin):
        started = time.perf_counter()
        texts = [trafilatura.extract(html, include_comments=False) or "" for html in (htmls if number else [])]
        print(json.dumps({"seconds": time.perf_counter() - started, "texts": texts}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A whole corpus from a folder, in a process of its own: prints its peak memory and what came out.

python corpus_run.py SOURCE OUT
"""

import json
import resource
import shutil
import sys
import time
from pathlib import Path

from soma.base.artefact import read_json
from soma.data.config import DataConfig
from soma.data.corpus import build_corpus


def main(source: str, out: str) -> None:
    shutil.rmtree(out, ignore_errors=True)
    Path(out).mkdir()
    started = time.perf_counter()
    build_corpus(DataConfig(sources=source, attributes=["gopher_quality", "gopher_repetition"]), Path(out))
    report = read_json(Path(out) / "report.json")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    facts = {
        "peak_bytes": usage.ru_maxrss * 1024, "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "seconds": round(time.perf_counter() - started, 1), "steps": report["steps"],
    }  # fmt: skip
    print(json.dumps(facts))
    shutil.rmtree(out)


if __name__ == "__main__":
    main(*sys.argv[1:])

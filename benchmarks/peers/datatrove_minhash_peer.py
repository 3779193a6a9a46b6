"""datatrove's MinHash deduplication, all four steps, on a JSONL file of {"id", "text"}; runs in the peers' environment.

    python datatrove_minhash_peer.py TEXTS.jsonl FOLDER

Answers each line of standard input with a line of JSON: the first when it is ready, the others after deduplicating:
{"seconds", "kept": [ids]}.
"""

import json
import shutil
import sys
import time
from pathlib import Path

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.logging import logger
from datatrove.utils.text import split_into_words


def deduplicate(texts: Path, work: Path) -> list[str]:
    """Signatures, buckets, clusters, filter: one task each, as datatrove's own example has it. The ids that stay."""
    config = MinhashConfig()  # 14 buckets of 8 hashes of 5-grams
    read = JsonlReader(str(texts.parent), glob_pattern=texts.name)
    steps = [
        [read, MinhashDedupSignature(f"{work}/signatures", config=config, skip_existing_sigs=False)],
        None,
        [MinhashDedupCluster(f"{work}/buckets", f"{work}/remove", config=config)],
        [read, MinhashDedupFilter(f"{work}/remove"), JsonlWriter(f"{work}/kept", compression=None)],
    ]
    steps[1] = [MinhashDedupBuckets(f"{work}/signatures", f"{work}/buckets", config=config)]
    for step in steps:
        tasks = config.num_buckets if step is steps[1] else 1
        LocalPipelineExecutor(step, tasks=tasks, workers=1, skip_completed=False, logging_dir=f"{work}/logs").run()
    return [json.loads(line)["id"] for path in Path(work, "kept").glob("*") for line in path.read_text().splitlines()]


def main(texts: str, folder: str) -> None:
    logger.remove()
    split_into_words("Load the tokenizer.")
    print(json.dumps("ready"), flush=True) if sys.stdin.readline() else None
    for _ in sys.stdin:
        work = Path(folder) / "datatrove"
        shutil.rmtree(work, ignore_errors=True)
        started = time.perf_counter()
        kept = deduplicate(Path(texts), work)
        print(json.dumps({"seconds": time.perf_counter() - started, "kept": kept}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Near-duplicates beside datatrove: cases of benchmarks/data.py."""

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import compare, make_case

SPEED_BAR, SIGNATURE_BAR = 20.0, 30.0  # times datatrove; MB/s on one core
COPIES = 0.3  # of the documents have a copy with words changed
ROWS = 2000  # documents in a partition
WORKERS = (1, 2, 8)


def with_copies(texts: Sequence[str]) -> list[str]:
    """The texts, and copies of some in which up to one word in 20 is another, in an order of their own."""
    generator = random.Random(11)
    copies = []
    for text in texts:
        words = text.split(" ")
        if len(words) > 40 and generator.random() < COPIES:
            for _ in range(generator.randint(1, max(1, len(words) // 100))):
                words[generator.randrange(len(words))] = f"changed{generator.randrange(10**6)}"
            copies.append(" ".join(words))
    every = [*texts, *copies]
    return generator.sample(every, len(every))


def write_rows(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(texts)))


def deduplicate(path: Path, work: Path, workers: int = 1) -> list[str]:
    """From JSONL to JSONL without near-duplicates: partitions, signatures, buckets, clusters, filter. Ids that stay."""
    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.json
    import pyarrow.parquet as pq

    from soma.data.config import DedupConfig
    from soma.data.dedup.near import near_partitions, survivors

    work.mkdir(parents=True)
    table = pa.json.read_json(path)
    parts = []
    for start in range(0, len(table), ROWS):
        parts.append(work / f"{len(parts):05d}.parquet")
        pq.write_table(table.slice(start, ROWS), parts[-1], compression="zstd")
    texts = table["text"]
    chars = pa.compute.utf8_length(texts).to_numpy()
    order = np.array(sorted(range(len(table)), key=texts.to_pylist().__getitem__))
    rank = np.empty(len(table), np.int64)
    rank[order] = np.arange(len(table))
    near = near_partitions(parts, rank, work / "near", DedupConfig(), workers)
    kept = np.sort(order[survivors(near.duplicates, chars[order]) == np.arange(len(table))])
    with open(work / "kept.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in table.take(kept).to_pylist())
    return [str(name) for name in table["id"].take(kept).to_pylist()]


def near(bench: Any, texts: Sequence[str], peer: Callable[..., Any]) -> None:
    """Megabytes of text per second, end to end, in one process each; then signatures alone, and the same survivors."""
    rows = with_copies(texts)
    size = sum(len(text.encode()) for text in rows) / 1e6
    path = bench.folder / "rows.jsonl"
    write_rows(path, rows)
    kept: dict[str, list[str]] = {}

    def ours() -> float:
        shutil.rmtree(bench.folder / "ours", ignore_errors=True)
        started = time.perf_counter()
        kept["ours"] = deduplicate(path, bench.folder / "ours")
        return size / (time.perf_counter() - started)

    other = peer("datatrove_minhash_peer", path, bench.folder)

    def theirs() -> float:
        reply = other.ask({})
        kept["datatrove"] = reply["kept"]
        return size / float(reply["seconds"])

    bench.cases += compare(
        "near-duplicates, end to end", "MB/s", ours, {"datatrove": theirs}, bars={"datatrove": SPEED_BAR},
        **bench.rounds,
    )  # fmt: skip
    other.close()
    one, two = (set(kept[name]) for name in ("ours", "datatrove"))
    bench.notes["near"] = {
        "megabytes": round(size, 1), "documents": len(rows), "copies": len(rows) - len(texts),
        "kept": {name: len(ids) for name, ids in kept.items()}, "kept by ours alone": len(one - two),
        "kept by datatrove alone": len(two - one),
    }  # fmt: skip
    bench.cases += [signatures(bench, rows, size), same_survivors(bench, rows)]


def signatures(bench: Any, rows: Sequence[str], size: float) -> Any:
    """Texts to MinHash signatures, normalisation and all, on one core."""
    from soma.data.config import DedupConfig
    from soma.data.dedup.minhash import minhash_words
    from soma.data.dedup.words import parse

    speeds = []
    for _ in range(bench.options.warmup + bench.options.rounds):
        wall, core = time.perf_counter(), time.process_time()
        for start in range(0, len(rows), 512):
            minhash_words(parse(rows[start : start + 512]), DedupConfig())
        # Daft may use several threads: what counts is the time of one core.
        speeds.append(size / max(time.perf_counter() - wall, time.process_time() - core))
    speeds = speeds[bench.options.warmup :]
    return make_case("MinHash signatures, one core", "MB/s", speeds, "bar", [SIGNATURE_BAR] * len(speeds), 1.0)


def same_survivors(bench: Any, rows: Sequence[str]) -> Any:
    """1 if the same texts stay for 1, 2 and 8 workers, each with the rows in another order."""
    from soma.data.dedup import near as module

    found = []
    for number, workers in enumerate(WORKERS):
        module.FEW = 0  # processes even for few documents
        shuffled = random.Random(number).sample(rows, len(rows))
        path = bench.folder / f"shuffled{workers}.jsonl"
        write_rows(path, shuffled)
        kept = deduplicate(path, bench.folder / f"workers{workers}", workers)
        found.append(sorted(shuffled[int(name)] for name in kept))
    same = float(all(texts == found[0] for texts in found))
    return make_case("the same survivors for 1, 2, 8 workers and shuffled input", "share", [same], "bar", [1.0], 1.0)

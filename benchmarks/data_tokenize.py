"""Token shards: the stage from a corpus folder on disk, beside `encode_batch` of the same texts in memory.

Ours loads the tokenizer, reads Parquet, encodes, writes shards with their offsets, hashes and index. The peer has its
tokenizer loaded and its texts in a list, and drops what it makes. Both use as many threads as `--threads` says.
"""

import json
import os
import shutil
import time
from collections.abc import Callable
from typing import Any

from common import compare, make_case

BAR = 1.0
VOCABULARY = 32_000


def tokenize(bench: Any, texts: list[str]) -> None:
    """MB of text a second, by the clock and by CPU time, in the same rounds."""
    os.environ["RAYON_NUM_THREADS"] = str(bench.options.threads)  # read once, when the library first encodes
    from soma.data.config import DataConfig, TokenizerConfig
    from soma.data.corpus import SPLITS, build_corpus, read_corpus
    from soma.data.tokenizer import train_tokenizer
    from soma.data.tokens import tokenize_corpus
    from soma.model.tokenizer import Tokenizer

    source, corpus, trained, out = (bench.folder / name for name in ("source", "tokenize", "tokenizer", "tokens"))
    for folder in (source, corpus, trained):
        folder.mkdir()
    (source / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build_corpus(DataConfig(sources=[str(source)], dedup={"near": False}), corpus)  # type: ignore[arg-type]
    train_tokenizer(TokenizerConfig(vocab_size=VOCABULARY), corpus, trained)
    kept = [row["text"] for split in SPLITS for row in read_corpus(corpus, split, ["text"])]
    megabytes = sum(len(text.encode()) for text in kept) / 1e6
    inner = Tokenizer.load(trained).inner
    cpu: dict[str, list[float]] = {"ours": [], "tokenizers": []}

    def measured(side: str, work: Callable[[], object]) -> float:
        wall, process = time.perf_counter(), time.process_time()
        work()
        cpu[side].append(megabytes / (time.process_time() - process))
        return megabytes / (time.perf_counter() - wall)

    def ours() -> float:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        return measured("ours", lambda: tokenize_corpus(corpus, trained, out))

    def theirs() -> float:
        return measured("tokenizers", lambda: inner.encode_batch(kept, add_special_tokens=False))

    name = f"corpus to token shards, {bench.options.threads} thread(s)"
    bench.cases += compare(
        f"{name}, wall", "MB/s", ours, {"tokenizers": theirs}, bars={"tokenizers": BAR}, **bench.rounds
    )
    own, peer = (cpu[side][bench.options.warmup :] for side in ("ours", "tokenizers"))
    bench.cases.append(make_case(f"{name}, CPU", "MB per CPU s", own, "tokenizers", peer, BAR))
    bench.notes["tokenize"] = {"documents": len(kept), "megabytes": megabytes, "vocabulary": VOCABULARY}

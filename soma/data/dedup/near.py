"""Near-duplicates over partitions: any number of documents, on disk, over processes, the same for any number of them.

    signatures   a partition → its band hashes, (bands, rows) uint64                        336 bytes a document on disk
    candidates   a band, or some → pairs of documents with the same hash, sorted              8 bytes a pair on disk
    shingles     a partition → hashed word n-grams of its documents that are in a pair        8 bytes a shingle on disk
    verify       a block of pairs → those that are truly alike, with their Jaccard similarity
    components   all of these → clusters

Each step's tasks write whole files under a name that depends on their content and settings, so a killed run goes on. In
memory a process holds one partition's batch, or `SORT_ROWS` hashes of one band, or one block of pairs; the caller holds
about 40 bytes a document. Documents are numbered by `rank`, their place in an order that does not depend on the input's
(by id): so neither do buckets, windows and clusters. `soma.data.dedup.small` is the plain reference.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from soma.base import progress
from soma.base.artefact import file_hash, json_hash, read_json, write_json
from soma.data.config import DedupConfig
from soma.data.dedup.connect import Forest, components
from soma.data.dedup.files import array_hash, map_array, save_array
from soma.data.dedup.minhash import MINHASH_SEED, banding, minhash_words
from soma.data.dedup.small import BUCKET_WINDOW
from soma.data.dedup.words import SPREAD, distinct, mix, parse, shingle_hashes
from soma.data.workers import Runner, map_tasks

FORMAT = 2  # raise it when the same partitions come to give other files
BATCH_ROWS = 512
FEW = 20_000  # up to this many documents it is done sooner than processes have started
SORT_ROWS = 8 << 20  # hashes of a band that are sorted at once
PAIR_ROWS = 1 << 18  # rows of sorted hashes from which pairs are made at once
SMALLEST_BLOCK, LARGEST_BLOCK = 1 << 12, 1 << 16  # documents whose pairs are verified by one task
GROUP_ROWS = 1 << 18  # hashes that a task sorts at least, if need be of several bands
OPEN_FILES = 200  # partitions whose shingles a process has mapped
PAIR = np.dtype([("left", "<u4"), ("right", "<u4"), ("jaccard", "<f8")])
LOW = np.uint64((1 << 32) - 1)


@dataclass(frozen=True)
class Near:
    """Clusters by rank: for each document its smallest relative, int64 (documents,).

    `duplicates` joins documents at or above the threshold, `groups` those at or above the straddle threshold.
    `similar`: the verified pairs, as `PAIR`. `candidates`: distinct pairs before verification.
    """

    duplicates: np.ndarray
    groups: np.ndarray
    similar: np.ndarray
    candidates: int
    bands: int
    rows: int


@dataclass(frozen=True)
class Job:
    """What all tasks of one run know. `parts`: Parquet files with `text` (and `signatures`, where known)."""

    parts: tuple[Path, ...]
    keys: tuple[str, ...]
    signatures: Path
    folder: Path
    config: DedupConfig
    documents: int
    old: int
    group: int  # bands that one task sorts: one, unless there are few documents
    block: int  # documents whose pairs one task verifies; neither depends on the workers

    @property
    def bands(self) -> tuple[int, int]:
        return banding(self.config.num_hashes, self.config.straddle_threshold)

    def band_file(self, number: int) -> Path:
        return self.signatures / f"{self.keys[number]}.npy"

    def shingle_files(self, number: int) -> tuple[Path, Path]:
        """(offsets of each row, hashes); the first is written last."""
        return self.folder / "shingles" / f"{number:05d}.offsets.npy", self.folder / "shingles" / f"{number:05d}.npy"


Task = tuple[Job, int]


def near_partitions(
    parts: Sequence[Path],
    rank_N: np.ndarray,
    work: Path,
    config: DedupConfig,
    workers: int = 1,
    runner: Runner = "local",
    old: int = 0,
) -> Near:
    """Clusters of near-duplicates among the rows of `parts`.

    `rank_N` int64: for every row of the parts, one after the other, its rank from 0, or -1 for a row that takes no
    part. Ranks below `old` are documents of an index: they are not compared with each other. `work`: a folder that
    survives a kill. Fewer than 2^32 documents.
    """
    bands, rows = banding(config.num_hashes, config.straddle_threshold)
    settings = [FORMAT, MINHASH_SEED, config.num_hashes, config.ngram, bands, rows]
    keys = tuple(json_hash([file_hash(part), settings])[:32] for part in parts)
    documents = int(rank_N.max(initial=-1)) + 1
    assert documents < 1 << 32, "ranks are 32-bit"
    named = [keys, settings, config.threshold, config.straddle_threshold, old, array_hash(rank_N)]
    folder = work / f"near-{json_hash(named)[:20]}"
    group = max(1, min(bands, GROUP_ROWS // max(1, documents)))
    block = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, -(-documents // 64)))
    job = Job(tuple(parts), keys, work / "signatures", folder, config, documents, old, group, block)
    for name in ("candidates", "shingles", "verified"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _save_once(folder / "ranks.npy", rank_N)
    workers = workers if documents > FEW else 1
    _run(write_bands, job, {n: job.band_file(n) for n in range(len(parts))}, workers, runner, "signatures")
    found = {group: folder / "candidates" / f"{group:03d}.json" for group in range(-(-bands // job.group))}
    _run(find_candidates, job, found, workers, runner, "buckets")
    _mark_wanted(job)
    wanted = {n: job.shingle_files(n)[0] for n in range(len(parts))}
    _run(write_shingles, job, wanted, workers, runner, "shingles")
    blocks = {block: folder / "verified" / f"{block:05d}.json" for block in range(-(-documents // job.block))}
    _run(verify_block, job, blocks, workers, runner, "pairs")
    similar = np.concatenate([np.zeros(0, PAIR), *(np.load(path.with_suffix(".npy")) for path in blocks.values())])
    alike = similar[similar["jaccard"] >= config.threshold]
    return Near(
        components(documents, alike["left"], alike["right"]),
        components(documents, similar["left"], similar["right"]),
        similar, sum(read_json(path)["candidates"] for path in blocks.values()), bands, rows,
    )  # fmt: skip


def survivors(labels: np.ndarray, chars_N: np.ndarray, keep: str = "longest", old: int = 0) -> np.ndarray:
    """For every rank the rank of the document that stays in its place, int64: its own if it stays.

    `labels`: each rank's cluster.

    The longest of a cluster (`chars_N`, characters by rank), ties to the smallest rank; or the smallest rank. Where a
    cluster has a document of the index (a rank below `old`), the smallest of those stands for it.
    """
    ranks = np.arange(len(labels))
    lengths = chars_N if keep == "longest" else np.zeros(len(labels), np.int64)
    order = np.lexsort((ranks, np.where(ranks < old, 0, -lengths), ranks >= old, labels))
    first = np.ones(len(order), bool)
    first[1:] = labels[order[1:]] != labels[order[:-1]]
    stays = np.empty(len(order), np.int64)
    stays[order] = order[first][np.cumsum(first) - 1]
    stays[:old] = ranks[:old]
    return stays


def members(labels_N: np.ndarray) -> Iterator[np.ndarray]:
    """The clusters of two and more, each ascending, in the order of their smallest members."""
    order = np.argsort(labels_N, kind="stable")
    ends = np.flatnonzero(np.diff(labels_N[order])) + 1
    yield from (cluster for cluster in np.split(order, ends) if len(cluster) > 1)


def _run(function: Any, job: Job, outputs: dict[int, Path], workers: int, runner: Runner, name: str) -> None:
    """The tasks whose output is not there yet."""
    waiting = [(job, number) for number, path in outputs.items() if not path.exists()]
    with progress.current().task(f"near-duplicates: {name}", total=len(outputs), unit="parts") as bar:
        bar.skip(len(outputs) - len(waiting))
        for _ in map_tasks(function, waiting, workers, runner):
            bar.advance(1)


def _save_once(path: Path, array: np.ndarray) -> None:
    if not path.exists():
        save_array(path, array)


# --- Signatures ---


def write_bands(task: Task) -> None:
    """A partition's band hashes, (bands, rows) uint64."""
    job, number = task
    bands, rows = job.bands
    parts = [band_hashes(signatures_NH, bands, rows) for signatures_NH in _signatures(job, number)]
    save_array(job.band_file(number), np.concatenate([np.zeros((bands, 0), np.uint64), *parts], axis=1))


def _signatures(job: Job, number: int) -> Iterator[np.ndarray]:
    """Batches of signatures: those of the partition, or computed from its texts."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(job.parts[number]) as file:
        known = "signatures" in file.schema_arrow.names
        for batch in file.iter_batches(BATCH_ROWS, columns=["signatures" if known else "text"]):
            if known:
                yield np.asarray(batch.column(0).flatten()).reshape(-1, job.config.num_hashes)
            else:
                yield minhash_words(parse(batch.column(0).to_pylist()), job.config)


def band_hashes(signatures_NH: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """One 64-bit hash of each band of each signature, (bands, documents). Equal for equal bands; else equal by chance
    with probability 2^-64, which costs a comparison and no more.
    """
    used = signatures_NH[:, : bands * rows].reshape(-1, bands, rows).astype(np.uint64)
    weights = np.array([pow(SPREAD, place + 1, 1 << 64) for place in range(rows)], np.uint64)
    return np.ascontiguousarray(mix((used * weights).sum(axis=2, dtype=np.uint64)).T)


# --- Candidates ---


def find_candidates(task: Task) -> None:
    """The pairs of a group of bands, as left << 32 | right, in sorted files `candidates/GROUP-RUN.npy`.

    GROUP.json says how many. Several bands are merged in memory, for there are few documents then.
    """
    job, group = task
    done = job.folder / "candidates" / f"{group:03d}.json"
    bands = range(group * job.group, min((group + 1) * job.group, job.bands[0]))
    passes = chain.from_iterable(_passes(job, band) for band in bands)
    found = chain.from_iterable(_pairs(keys, ranks, job.old) for keys, ranks in passes)
    runs = 0
    for pairs in found if len(bands) == 1 else [distinct(np.concatenate([np.zeros(0, np.uint64), *found]))]:
        save_array(done.with_name(f"{group:03d}-{runs:05d}.npy"), pairs)
        runs += 1
    write_json(done, {"runs": runs})


def _passes(job: Job, band: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Hashes of a band that occur more than once and the ranks that have them, sorted by both, a range at a time."""
    rank_N = map_array(job.folder / "ranks.npy")
    passes = max(1, -(-len(rank_N) // SORT_ROWS))
    for number in range(passes):
        keys, ranks, start = [], [], 0
        for part in range(len(job.parts)):
            key = np.asarray(map_array(job.band_file(part))[band])
            rank = np.asarray(rank_N[start : start + len(key)])
            start += len(key)
            here = rank >= 0
            if passes > 1:
                here &= (key >> np.uint64(32)) * np.uint64(passes) >> np.uint64(32) == number
            keys.append(key[here])
            ranks.append(rank[here])
        if keys:
            yield _repeated(np.concatenate(keys), np.concatenate(ranks))


def _repeated(keys: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ordered = np.sort(keys)
    again = distinct(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(again):
        return keys[:0], ranks[:0]
    place = np.searchsorted(again, keys)
    shared = again[np.minimum(place, len(again) - 1)] == keys
    keys, ranks = keys[shared], ranks[shared]
    order = np.lexsort((ranks, keys))
    return keys[order], ranks[order]


def _pairs(keys: np.ndarray, ranks: np.ndarray, old: int) -> Iterator[np.ndarray]:
    """Pairs within a bucket: each member with the `BUCKET_WINDOW` that follow it; sorted runs of bounded length."""
    for start in range(0, len(keys), PAIR_ROWS):
        stop = min(start + PAIR_ROWS, len(keys))
        found = []
        for step in range(1, BUCKET_WINDOW + 1):
            end = max(start, min(stop, len(keys) - step))
            same = np.flatnonzero(keys[start:end] == keys[start + step : end + step]) + start
            if not len(same):
                break
            right = ranks[same + step]
            new = right >= old
            found.append(ranks[same][new].astype(np.uint64) << np.uint64(32) | right[new].astype(np.uint64))
        if found:
            yield np.sort(np.concatenate(found))


def _runs(job: Job) -> list[Path]:
    folder = job.folder / "candidates"
    return [
        folder / f"{group:03d}-{run:05d}.npy"
        for group in range(-(-job.bands[0] // job.group))
        for run in range(read_json(folder / f"{group:03d}.json")["runs"])
    ]


def _mark_wanted(job: Job) -> None:
    """`wanted.npy`, bool by rank: who is in a pair; `places.npy` (documents, 2): each rank's part and row."""
    if (job.folder / "places.npy").exists():
        return
    wanted = np.zeros(job.documents, bool)
    for path in _runs(job):
        pairs = map_array(path)
        for start in range(0, len(pairs), 1 << 20):
            some = np.asarray(pairs[start : start + (1 << 20)])
            wanted[some >> np.uint64(32)] = True
            wanted[some & LOW] = True
    save_array(job.folder / "wanted.npy", wanted)
    rank_N = map_array(job.folder / "ranks.npy")
    places = np.zeros((job.documents, 2), np.int32)
    start = 0
    for part in range(len(job.parts)):
        size = map_array(job.band_file(part)).shape[1]
        rank = np.asarray(rank_N[start : start + size])
        start += size
        rows = np.flatnonzero(rank >= 0)
        places[rank[rows], 0], places[rank[rows], 1] = part, rows
    assert start == len(rank_N), "one rank for each row of the partitions"
    save_array(job.folder / "places.npy", places)


# --- Verification ---


def write_shingles(task: Task) -> None:
    """Hashed shingles of the partition's documents that are in a pair; other rows have none."""
    import pyarrow.parquet as pq

    job, number = task
    places, wanted = map_array(job.folder / "places.npy"), map_array(job.folder / "wanted.npy")
    rows = np.sort(places[:, 1][(places[:, 0] == number) & wanted])
    counts, hashes, start = [np.zeros(1, np.int64)], [np.zeros(0, np.uint64)], 0
    with pq.ParquetFile(job.parts[number]) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=["text"]):
            here = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + len(batch))] - start
            start += len(batch)
            count = np.zeros(len(batch), np.int64)
            if len(here):
                found, offsets = shingle_hashes(parse(batch.column(0).take(here).to_pylist()), job.config.ngram)
                hashes.append(found)
                count[here] = np.diff(offsets)
            counts.append(count)
    offsets_path, hashes_path = job.shingle_files(number)
    save_array(hashes_path, np.concatenate(hashes))
    save_array(offsets_path, np.cumsum(np.concatenate(counts)))


def verify_block(task: Task) -> None:
    """The pairs of a block's documents with those after them that are alike enough, as `PAIR`, by left and right.

    A pair whose two are joined already at the threshold, within the block, is not looked at: it can join nothing.
    """
    job, block = task
    pairs = _block_pairs(job, block)
    left, right = (pairs >> np.uint64(32)).astype(np.int64), (pairs & LOW).astype(np.int64)
    places = map_array(job.folder / "places.npy")

    @lru_cache(OPEN_FILES)
    def files(part: int) -> tuple[np.ndarray, np.ndarray]:
        offsets_path, hashes_path = job.shingle_files(part)
        return map_array(offsets_path), map_array(hashes_path)

    def shingles(rank: int) -> np.ndarray:
        part, row = places[rank].tolist()
        offsets, hashes = files(part)
        return np.asarray(hashes[offsets[row] : offsets[row + 1]])

    joined, similar, last, mine = Forest(), [], -1, np.zeros(0, np.uint64)
    for one, other in zip(left.tolist(), right.tolist(), strict=True):
        if joined.find(one) == joined.find(other):
            continue
        if one != last:
            last, mine = one, shingles(one)
        value = jaccard_sorted(mine, shingles(other), job.config.straddle_threshold)
        if value >= job.config.straddle_threshold:
            similar.append((one, other, value))
        if value >= job.config.threshold:
            joined.union(one, other)
    path = job.folder / "verified" / f"{block:05d}.npy"
    save_array(path, np.array(similar, PAIR))
    write_json(path.with_suffix(".json"), {"candidates": len(pairs)})


def _block_pairs(job: Job, block: int) -> np.ndarray:
    """Distinct pairs of all bands whose left document is in the block, ascending."""
    bounds = np.array([block * job.block, (block + 1) * job.block], np.uint64) << np.uint64(32)
    merged, waiting, size = np.zeros(0, np.uint64), [], 0
    for path in _runs(job):
        run = map_array(path)
        low, high = np.searchsorted(run, bounds)
        waiting.append(np.asarray(run[low:high]))
        size += high - low
        if size > 4 << 20:
            merged, waiting, size = distinct(np.concatenate([merged, *waiting])), [], 0
    return distinct(np.concatenate([merged, *waiting]))


def jaccard_sorted(left: np.ndarray, right: np.ndarray, at_least: float = 0.0) -> float:
    """|A ∩ B| / |A ∪ B| of two ascending arrays without repeats; 0 where their sizes say it is below `at_least`."""
    if min(len(left), len(right)) < at_least * max(len(left), len(right)):
        return 0.0
    both = np.concatenate([left, right])
    both.sort()
    common = int(np.count_nonzero(both[1:] == both[:-1]))
    return common / (len(both) - common)

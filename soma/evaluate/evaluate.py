"""The evaluation of one model: `scores.json`, `tokens.parquet` (what was scored, to add up again), `samples.parquet`,
`words.json` (input embeddings of words on a plane, see `soma.model.embeddings.facts_of`).

`scores.json`:

* `bits_per_byte`: {value, low, high, level, resamples}; `perplexity` per token; `documents`, `bytes`, `tokens`, `nats`.
* `baselines`: {gzip, xz: {bytes, bits_per_byte}} on the same bytes. `kinds`: {kind: {documents, bytes, …}}.
* `answers`: {conversations, longer_than_window, tokens, nats_per_token, interval, perplexity} on held-out instruction
  pairs, or null.
* `corpus_hash`, `python` (both from the corpus report), `model_hash`, `token_ids_hash`, `tokenizer_hash`, `parameters`.
* `window`: {sequence_length, stride, separator_id}, `precision`, `split`, `measured`: the share of the split's bytes,
  `decoded_exactly`: documents whose ids decode to the very text (the others' figures miss what the ids lost).
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from soma.base.artefact import content_hash, read_json, write_json
from soma.base.errors import UserError
from soma.data.corpus import read_corpus
from soma.evaluate.answers import score_answers
from soma.evaluate.baselines import baselines
from soma.evaluate.config import EvaluateConfig
from soma.evaluate.perplexity import (
    LEVEL,
    Score,
    all_ids_hash,
    by_kind,
    ids_hash,
    interval,
    score_texts,
    separator_id,
    to_bits_per_byte,
    totals,
    window_settings,
)
from soma.evaluate.samples import make_samples
from soma.model.embeddings import facts_of
from soma.model.hub import load_model
from soma.model.tokenizer import Tokenizer
from soma.train.compute import native_bf16, resolve_device

Row = dict[str, Any]
CLOSE = 1e-9  # relative difference that adding up again may show


def evaluate(
    config: EvaluateConfig, out: Path, *, model: Path, corpus: Path, instruct: Path | None = None,
    split: str = "validation", device: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Measure a model folder on a corpus's held-out split, fill `out`, and return what `scores.json` says.

    `instruct` is a tokens folder with loss masks, whose split of the same name is measured too. Timings go to
    `out/logs/timing.json`; all else depends on the inputs alone (and on thread count and torch version, in the last
    digits). Raises UserError for an empty split, a model without tokenizer, or one that does not fit.
    """
    started = time.monotonic()
    place = resolve_device(device)
    precision = ("bf16" if native_bf16(place) else "fp32") if config.precision == "auto" else config.precision
    rows, available = held_out(corpus, split, config.max_bytes)
    tokenizer = Tokenizer.load(model)
    network = load_model(model, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, device=place)
    length, stride = window_settings(network, config.sequence_length, config.stride)
    scores = score_texts(
        network, tokenizer, [row["text"] for row in rows], sequence_length=length, stride=stride,
        batch_size=config.batch_size,
    )  # fmt: skip
    scored = time.monotonic()
    facts = describe(config, rows, scores) | {
        "format": "soma-scores", "version": 1, "split": split, "precision": precision,
        "measured": sum(row["n_bytes"] for row in rows) / available,
        "window": {"sequence_length": length, "stride": stride, "separator_id": separator_id(tokenizer)},
        "tokenizer_hash": tokenizer.hash,
        "parameters": sum(tensor.numel() for tensor in network.parameters()), "model_hash": content_hash(model),
        "decoded_exactly": sum(
            tokenizer.decode(score.ids.tolist(), skip_special=False) == row["text"]
            for score, row in zip(scores, rows, strict=True)
        ),
    } | corpus_identity(corpus)  # fmt: skip
    facts["answers"] = None
    if instruct is not None:
        facts["answers"] = score_answers(
            network, instruct, split=split, length=length, stride=stride, batch_size=config.batch_size,
            resamples=config.resamples, seed=config.seed,
        )  # fmt: skip
    write_json(out / "scores.json", facts)
    write_tokens(out / "tokens.parquet", rows, scores, config.record_logprobs)
    write_json(out / "words.json", facts_of(model))
    make_samples(config, network, tokenizer, rows, out / "samples.parquet")
    (out / "logs").mkdir(exist_ok=True)
    seconds = {"scoring_seconds": scored - started, "seconds": time.monotonic() - started}
    write_json(out / "logs" / "timing.json", seconds | {"tokens_per_second": facts["tokens"] / (scored - started)})
    return facts


def held_out(corpus: Path, split: str, max_bytes: int | None) -> tuple[list[Row], int]:
    """The rows to measure, in order of their id, and the bytes of the whole split.

    With `max_bytes`, the first rows that stay within it, at least one. UserError for a split without text.
    """
    rows = [row for row in read_corpus(corpus, split, ["id", "text", "source", "kind", "n_bytes"]) if row["text"]]
    if not rows:
        raise UserError(f"{corpus}: the split {split!r} has no text; raise data.validation_fraction or add documents")
    total, kept = 0, 0
    for row in rows:
        total += row["n_bytes"]
        if max_bytes is not None and total > max_bytes and kept:
            break
        kept += 1
    return rows[:kept], sum(row["n_bytes"] for row in rows)


def corpus_identity(corpus: Path) -> dict[str, Any]:
    """Corpus hash and Python version, which belong beside every figure taken on the corpus."""
    report = read_json(corpus / "report.json")
    return {key: report.get(key) for key in ("corpus_hash", "python")}


def describe(config: EvaluateConfig, rows: Sequence[Row], scores: Sequence[Score]) -> dict[str, Any]:
    """The figures of a scored set: totals, interval, kinds, baselines."""
    whole = totals(scores)
    inside = interval(scores, config.resamples, config.seed) or (None, None)
    bits = {
        "value": whole.pop("bits_per_byte"), "low": inside[0], "high": inside[1], "level": LEVEL,
        "resamples": config.resamples,
    }  # fmt: skip
    return whole | {
        "bits_per_byte": bits, "kinds": by_kind(scores, [row["kind"] for row in rows]),
        "baselines": baselines(config.baselines, [row["text"] for row in rows]), "token_ids_hash": all_ids_hash(scores),
    }  # fmt: skip


# --- What an auditor needs ---


def write_tokens(path: Path, rows: Sequence[Row], scores: Sequence[Score], logprobs: bool) -> None:
    """One row a document: id, source, kind, bytes, tokens, nats, hash of its token ids, and each id and logprob."""
    import pyarrow
    import pyarrow.parquet as pq

    columns: dict[str, pyarrow.Array] = {
        name: pyarrow.array([row[name] for row in rows], pyarrow.string()) for name in ("id", "source", "kind")
    }
    columns["n_bytes"] = pyarrow.array([score.n_bytes for score in scores], pyarrow.int64())
    columns["n_tokens"] = pyarrow.array([len(score.ids) for score in scores], pyarrow.int64())
    columns["nats"] = pyarrow.array([score.nats for score in scores], pyarrow.float64())
    columns["ids_hash"] = pyarrow.array([ids_hash(score.ids) for score in scores], pyarrow.string())
    if logprobs:
        columns["ids"] = pyarrow.array([score.ids for score in scores], pyarrow.list_(pyarrow.uint32()))
        columns["logprobs"] = pyarrow.array([score.logprobs for score in scores], pyarrow.list_(pyarrow.float32()))
    pq.write_table(pyarrow.table(columns), path, compression="zstd", store_schema=False)


def audit(directory: Path) -> dict[str, Any]:
    """Add the recorded tokens up again. Raises UserError, naming the figure, where `scores.json` says otherwise."""
    import pyarrow.parquet as pq

    facts = read_json(directory / "scores.json")
    rows = pq.read_table(directory / "tokens.parquet").to_pylist()
    for row in rows:
        if "ids" in row:
            score = Score(np.array(row["ids"], np.uint32), np.array(row["logprobs"], np.float32), row["n_bytes"])
            _same(directory, f"nats of {row['source']}", score.nats, row["nats"])
            if ids_hash(score.ids) != row["ids_hash"]:
                raise UserError(f"{directory}: the token ids of {row['source']} are not those of their hash")
    nats, n_bytes = sum(row["nats"] for row in rows), sum(row["n_bytes"] for row in rows)
    _same(directory, "bits_per_byte", to_bits_per_byte(nats, n_bytes), facts["bits_per_byte"]["value"])
    _same(directory, "tokens", sum(row["n_tokens"] for row in rows), facts["tokens"])
    return {"documents": len(rows), "bits_per_byte": to_bits_per_byte(nats, n_bytes)}


def _same(directory: Path, name: str, found: float, said: float) -> None:
    if abs(found - said) > CLOSE * max(abs(found), abs(said)):
        raise UserError(f"{directory}: {name} is {said} in the record, but the tokens add up to {found}")

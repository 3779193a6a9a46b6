"""The evaluation's artefact: what it says, that it says the same twice, and that an auditor can add it up again."""

import json
import lzma
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from soma.base.artefact import content_hash, read_json, write_json
from soma.base.errors import UserError
from soma.data.config import InstructConfig
from soma.data.instruct import build_instruct
from soma.data.loader import TokenLoader
from soma.data.tokens import tokenize_instruct
from soma.evaluate.answers import answer_costs, score_answers
from soma.evaluate.baselines import baselines, compressed_size
from soma.evaluate.config import EvaluateConfig, SampleConfig
from soma.evaluate.evaluate import audit, evaluate, held_out
from soma.evaluate.samples import read_samples
from soma.model.hub import load_model
from soma.model.tokenizer import Tokenizer

SAMPLES = SampleConfig(prompts=["the cat"], chat_prompts=["Write add."], held_out=2, prompt_tokens=8, max_tokens=12)
CONFIG = EvaluateConfig(resamples=100, samples=SAMPLES)


@pytest.fixture(scope="module")
def instruct_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of a user's own file, as masked tokens."""
    source, corpus, out = (tmp_path_factory.mktemp(name) for name in ("own", "pairs", "instruct_tokens"))
    rows = [
        {"instruction": f"Write {name}.", "output": f"def {name}(a, b):\n    return a {sign} b  # {sign * (index + 1)}"}
        for index, (name, sign) in enumerate(zip(["add", "sub", "mul", "div", "mod", "power"], "+-*/%^", strict=True))
    ]
    (source / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build_instruct(InstructConfig(sources=[str(source / "pairs.jsonl")], validation_fraction=0.4), None, corpus)
    tokenize_instruct(corpus, tokenizer_dir, out)
    return out


@pytest.fixture(scope="module")
def made(model_dir: Path, corpus_dir: Path, instruct_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scores")
    evaluate(CONFIG, out, model=model_dir, corpus=corpus_dir, instruct=instruct_dir)
    return out


def test_scores(made: Path, corpus_dir: Path, model_dir: Path) -> None:
    facts = read_json(made / "scores.json")
    words = read_json(made / "words.json")
    assert words is None or len(words["words"]) == len(words["points"]) >= 3
    rows = pq.read_table(corpus_dir / "validation-00000.parquet").to_pylist()
    assert facts["corpus_hash"] == "c0ffee"
    assert facts["python"] == "3.11.9"
    assert facts["model_hash"] == content_hash(model_dir)
    assert facts["bytes"] == sum(len(row["text"].encode()) for row in rows)
    assert facts["measured"] == 1.0
    assert facts["decoded_exactly"] == facts["documents"] == len(rows)
    bits = facts["bits_per_byte"]
    assert bits["low"] < bits["value"] < bits["high"]
    assert set(facts["kinds"]) == {"py", "md"}
    joined = "".join(row["text"] for row in rows).encode()
    assert facts["baselines"]["xz"]["bytes"] == len(lzma.compress(joined, preset=9, check=lzma.CHECK_CRC64))
    assert facts["window"] == {"sequence_length": 128, "stride": 64, "separator_id": 0}
    assert read_json(made / "logs" / "timing.json")["tokens_per_second"] > 0


def test_the_same_twice(made: Path, model_dir: Path, corpus_dir: Path, instruct_dir: Path, tmp_path: Path) -> None:
    evaluate(CONFIG, tmp_path, model=model_dir, corpus=corpus_dir, instruct=instruct_dir)
    assert content_hash(tmp_path) == content_hash(made)


def test_answers_are_counted_by_their_mask(made: Path, instruct_dir: Path) -> None:
    answers = read_json(made / "scores.json")["answers"]
    mask = np.fromfile(instruct_dir / "validation-00000.mask.bin", np.uint8)
    index = read_json(instruct_dir / "index.json")
    assert answers["conversations"] == index["splits"]["validation"]["documents"] > 0
    assert answers["tokens"] == mask.sum() < len(mask)
    assert answers["perplexity"] == pytest.approx(np.exp(answers["nats_per_token"]))
    costs, sizes = answer_costs(
        [np.array([-9, -1, -0.5, -0.5], np.float32), np.array([-4], np.float32), np.array([-7], np.float32)],
        [np.array([0, 0, 1, 1, 1]), np.array([0, 1]), np.array([1, 0])],
    )
    assert (costs.tolist(), sizes.tolist()) == ([2.0, 4.0], [3.0, 1.0])
    assert costs.sum() / sizes.sum() == 1.5


def test_answers_agree_with_the_loader_that_training_reads(model_dir: Path, instruct_dir: Path) -> None:
    """Packed with others under document masks or alone in a window: the same tokens, the same loss."""
    model = load_model(model_dir, dtype=torch.float32)
    settings: dict[str, Any] = {
        "split": "validation",
        "length": 128,
        "stride": 64,
        "batch_size": 2,
        "resamples": 0,
        "seed": 0,
    }
    ours = score_answers(model, instruct_dir, **settings)
    assert ours is not None
    assert ours["longer_than_window"] == 0
    nats, count = 0.0, 0
    for batch in TokenLoader(instruct_dir, "validation", sequence_length=128, batch_size=2, epochs=1):
        with torch.inference_mode():
            logits = model(*(torch.from_numpy(part) for part in (batch.tokens, batch.positions, batch.document_ids)))
        targets = torch.from_numpy(batch.targets)
        chosen = targets >= 0
        nats += float(torch.nn.functional.cross_entropy(logits[chosen], targets[chosen], reduction="sum"))
        count += int(chosen.sum())
    assert ours["tokens"] == count
    assert ours["nats_per_token"] == pytest.approx(nats / count, abs=1e-4)
    short = score_answers(model, instruct_dir, **settings | {"length": 16, "stride": 8})
    assert short is not None
    assert short["longer_than_window"] == short["conversations"]
    assert short["tokens"] == count, "what is longer than the window is scored too"


def test_no_held_out_pairs_is_no_score(model_dir: Path, corpus_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "instruct"
    folder.mkdir()
    index = {"format": "soma-tokens", "version": 1, "masked": True, "splits": {}}
    write_json(folder / "index.json", index)
    (tmp_path / "out").mkdir()
    config = EvaluateConfig(resamples=0, samples=SampleConfig(held_out=0))
    facts = evaluate(config, tmp_path / "out", model=model_dir, corpus=corpus_dir, instruct=folder)
    assert facts["answers"] is None
    assert facts["bits_per_byte"]["low"] is None
    write_json(folder / "index.json", index | {"masked": False})
    with pytest.raises(UserError, match="plain text"):
        evaluate(config, tmp_path / "out", model=model_dir, corpus=corpus_dir, instruct=folder)


def test_samples(made: Path, model_dir: Path) -> None:
    samples = read_samples(made / "samples.parquet")
    assert [sample["origin"] for sample in samples] == ["prompt", "chat", "held-out", "held-out"]
    assert samples[0]["prompt"] == "the cat"
    assert samples[1]["prompt"] == "Write add."
    assert all(0 < sample["tokens"] <= 12 and sample["finish_reason"] in ("stop", "length") for sample in samples)
    assert [sample["seed"] for sample in samples] == [0, 1, 2, 3]
    assert samples[2]["reference"]
    assert samples[0]["reference"] is None
    ids = Tokenizer.load(model_dir).encode(samples[2]["prompt"])
    assert 1 <= len(ids) <= 9, "the first tokens of the document"


def test_audit_adds_up_and_finds_a_changed_figure(made: Path, tmp_path: Path) -> None:
    facts = read_json(made / "scores.json")
    assert audit(made)["bits_per_byte"] == pytest.approx(facts["bits_per_byte"]["value"], rel=1e-12)
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    changed = json.loads(json.dumps(facts))
    changed["bits_per_byte"]["value"] *= 1.0001
    write_json(copy / "scores.json", changed)
    with pytest.raises(UserError, match="bits_per_byte is"):
        audit(copy)
    write_json(copy / "scores.json", facts)
    table = pq.read_table(copy / "tokens.parquet")
    rows = table.to_pylist()
    rows[3]["logprobs"][0] += 0.5
    pq.write_table(type(table).from_pylist(rows, table.schema), copy / "tokens.parquet")
    with pytest.raises(UserError, match="nats of file"):
        audit(copy)


def test_without_logprobs_only_totals_are_kept(model_dir: Path, corpus_dir: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(record_logprobs=False, samples=SampleConfig(held_out=0), resamples=0)
    evaluate(config, tmp_path, model=model_dir, corpus=corpus_dir)
    names = pq.read_schema(tmp_path / "tokens.parquet").names
    assert "ids_hash" in names
    assert "logprobs" not in names
    audit(tmp_path)


def test_max_bytes_takes_whole_documents(corpus_dir: Path) -> None:
    rows, available = held_out(corpus_dir, "validation", None)
    some, same = held_out(corpus_dir, "validation", 1000)
    assert same == available
    assert 0 < sum(row["n_bytes"] for row in some) <= max(1000, rows[0]["n_bytes"])
    assert some == rows[: len(some)]
    assert len(held_out(corpus_dir, "validation", 1)[0]) == 1
    with pytest.raises(UserError, match="train"):
        held_out(corpus_dir, "train", None)


@pytest.mark.parametrize("name", ["gzip", "xz"])
def test_baselines_are_what_the_programs_give(name: str) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"no {name} program to compare with")
    texts = [f"line {index * index} ü\n" * (index % 7) for index in range(2000)]
    raw = "".join(texts).encode()
    theirs = len(subprocess.run([name, "-9", "-c"], input=raw, capture_output=True, check=True).stdout)
    assert compressed_size(name, texts) == pytest.approx(theirs, rel=2e-3)


def test_baselines() -> None:
    found = baselines(["gzip", "xz"], ["ab" * 5000, "ab" * 5000])
    assert found["xz"]["bits_per_byte"] == 8 * found["xz"]["bytes"] / 20000 < 0.2
    apart = sum(compressed_size("gzip", [text]) for text in ["ab" * 5000] * 2)
    assert found["gzip"]["bytes"] < apart, "one stream: the second text is known from the first"
    assert baselines(["gzip"], [])["gzip"]["bits_per_byte"] == 0.0


@pytest.mark.parametrize(
    "settings", [{"stride": 9, "sequence_length": 8}, {"baselines": ["zip"]}, {"unknown": 1}, {"samples": {"top_p": 0}}]
)
def test_config_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        EvaluateConfig(**settings)

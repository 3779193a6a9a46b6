"""Mixtures: shares, limits, every part's sequences in its own order, any ranks, resume, a run of a recipe."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soma.base.artefact import read_json
from soma.base.errors import UserError
from soma.data.loader import IGNORE, Batch, TokenLoader
from soma.data.mixture import BLOCK, Schedule, write_mixture
from soma.data.tokens import SplitWriter, write_index
from soma.recipe import Recipe
from soma.stages.order import stages_of

EOS = 0


def write(out: Path, first: int, documents: int, size: int, tokenizer: str = "hash") -> Path:
    """Documents of distinct ids from `first` on."""
    out.mkdir()
    with SplitWriter(out, "train", 60_000, False) as writer:
        for document in range(documents):
            start = first + document * size
            writer.add([*range(start, start + size - 1), EOS], None, size)
    write_index(out, 60_000, tokenizer, EOS, False, {"train": writer.entry()})
    return out


@settings(max_examples=10, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    limits=st.lists(st.one_of(st.none(), st.integers(0, 3000)), min_size=5, max_size=5),
)
def test_shares_and_limits_hold_at_every_place(weights: list[float], limits: list[int | None]) -> None:
    limits = limits[: len(weights)]
    schedule = Schedule(weights, limits, seed=1)
    # The plain reference: one sequence after the other to the part that has the least for its weight.
    counts, total = np.zeros(len(weights), int), schedule.total
    cap = np.array([np.inf if limit is None else limit for limit in limits])
    steps = 12 * BLOCK if total is None else min(total, 12 * BLOCK)
    for step in range(steps):
        if step % 500 == 0:
            np.testing.assert_array_equal(schedule.given(step), counts)
        counts[np.argmin(np.where(counts < cap, (counts + 0.5) / schedule.weights, np.inf))] += 1
    np.testing.assert_array_equal(schedule.given(steps), counts)
    part, number = schedule.locate(np.arange(steps))
    if total is not None and total <= steps:
        assert (schedule.locate(np.arange(total, total + 2000))[0] == -1).all()
    for one in range(len(weights)):
        np.testing.assert_array_equal(np.sort(number[part == one]), np.arange(counts[one]))


def test_worked_example_and_order_within_a_block() -> None:
    schedule = Schedule([2, 1], [None, None], 0)
    assert (schedule.given(5).tolist(), schedule.given(6).tolist()) == ([3, 2], [4, 2])
    part, _ = schedule.locate(np.arange(16 * BLOCK))
    assert (np.diff(part) != 0).mean() < 0.6, "the parts come in no fixed turn"
    assert not np.array_equal(part, Schedule([2, 1], [None, None], 1).locate(np.arange(16 * BLOCK))[0])


def mix(tmp_path: Path, **changes: dict[str, Any]) -> Path:
    parts = []
    for number, (name, documents) in enumerate([("a", 30), ("b", 90), ("c", 10)]):
        folder = tmp_path / name
        if not folder.exists():
            write(folder, 1 + number * 2000, documents, 10)
        parts.append({"name": name, "tokens": folder, "weight": None, "epochs": None, **changes.get(name, {})})
    out = tmp_path / f"mixture{len(list(tmp_path.iterdir()))}"
    out.mkdir()
    write_mixture(out, parts)
    return out


def origins(batch: Batch) -> np.ndarray:
    """Of each row the part that it is from."""
    return np.array([(row[row > 0][0] - 1) // 2000 for row in batch.targets])


def test_a_mixture_gives_its_shares_and_each_part_in_full(tmp_path: Path) -> None:
    folder = mix(tmp_path, a={"weight": 2.0}, b={"weight": 1.0}, c={"weight": 1.0, "epochs": 2})
    loader = TokenLoader(folder, "train", 5, 8, seed=4)
    assert loader.sequences_per_epoch == 60 + 180 + 40
    rows = np.concatenate([origins(next(loader)) for _ in range(64)])  # four blocks of the schedule
    assert (rows == 2).sum() == 40, "two passes of 20 sequences, then no more"
    assert abs((rows == 0).sum() - 2 * (rows == 1).sum()) <= 3
    again = TokenLoader(folder, "train", 5, 1, seed=4)
    mine = [batch.tokens.tobytes() for batch in (next(again) for _ in range(100)) if origins(batch)[0] == 0]
    alone = {row.tobytes() for row in next(TokenLoader(tmp_path / "a", "train", 5, 60, seed=4)).tokens}
    assert len(set(mine)) == len(mine) > 30
    assert set(mine) <= alone, "a part's sequences are those that its folder alone would give"


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_and_resume(tmp_path: Path, world: int) -> None:
    folder = mix(tmp_path, a={"weight": 3.0}, b={"weight": 1.0})
    one = TokenLoader(folder, "train", 7, 2 * world, seed=9)
    for _ in range(5):
        next(one)
    many = [TokenLoader(folder, "train", 7, 2, rank, world, seed=9) for rank in range(world)]
    for loader in many:
        loader.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for _ in range(6):
        whole = next(one)
        np.testing.assert_array_equal(np.concatenate([next(loader).tokens for loader in many]), whole.tokens)
    other = mix(tmp_path, a={"weight": 2.0}, b={"weight": 1.0})
    with pytest.raises(UserError, match="other data"):
        TokenLoader(other, "train", 7, 2, seed=9).load_state_dict(one.state_dict())


def test_limits_of_all_parts_end_the_mixture(tmp_path: Path) -> None:
    folder = mix(tmp_path, a={"epochs": 2}, b={"epochs": 0.5}, c={"epochs": 1})
    loader = TokenLoader(folder, "train", 10, 7)
    assert loader.total == loader.sequences_per_epoch == 60 + 45 + 10
    batches = list(loader)
    rows = np.concatenate([batch.targets for batch in batches])
    real = rows[(rows != IGNORE).any(axis=1)]
    counts = np.bincount([(row[row > 0][0] - 1) // 2000 for row in real])
    assert counts.tolist() == [60, 45, 10]
    assert len(real) == 115


def test_mistakes_are_named(tmp_path: Path) -> None:
    folder = mix(tmp_path)
    write(tmp_path / "other", 1, 3, 5, tokenizer="another")
    out = tmp_path / "bad"
    out.mkdir()
    parts = [{"name": name, "tokens": tmp_path / name, "weight": None, "epochs": None} for name in ("a", "other")]
    with pytest.raises(UserError, match="other and a differ in tokenizer_hash"):
        write_mixture(out, parts)
    with pytest.raises(UserError, match="keep user, password"):
        write_mixture(out, [{**parts[0], "tokens": f"file://user:secret@{tmp_path}/a"}])
    with pytest.raises(UserError, match="no part of the mixture has the split 'validation'"):
        TokenLoader(folder, "validation", 4, 1)
    index = read_json(tmp_path / "a" / "index.json")
    index["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    (tmp_path / "a" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not the tokens that the mixture"):
        TokenLoader(folder, "train", 4, 1)


def recipe(**more: Any) -> dict[str, Any]:
    return {
        "name": "r", "data": {"sources": "x"}, "tokenizer": {"vocab_size": 300}, "train": {"steps": 2}, "tracking":
        {"enabled": False}, "model": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64}, **more,
    }  # fmt: skip


def test_stages_of_a_mixture() -> None:
    parts = [{"name": "own", "weight": 2}, {"name": "code", "data": {"sources": "y"}, "epochs": 3}]
    stages = {stage.name: stage for stage in stages_of(Recipe.model_validate(recipe(mixture=parts)))}
    assert list(stages) == ["corpus", "tokenizer", "tokens", "corpus_code", "tokens_code", "mixture", "train"]
    assert stages["mixture"].inputs == {"own": "tokens", "code": "tokens_code"}
    assert stages["tokens_code"].inputs == {"corpus": "corpus_code", "tokenizer": "tokenizer"}
    assert stages["train"].inputs["tokens"] == "mixture"
    for wrong, why in [
        ([{"name": "a"}, {"name": "a"}], "two parts of `mixture` are named a"),
        ([{"name": "a", "data": {"sources": "x"}, "tokens": "t"}], "both `data` and `tokens`"),
    ]:
        with pytest.raises(ValueError, match=why):
            Recipe.model_validate(recipe(mixture=wrong))


def test_a_recipe_trains_on_a_mixture(tmp_path: Path) -> None:
    from soma.run import run

    for kind in ("prose", "code"):
        (tmp_path / kind).mkdir()
        for number in range(12):
            words = " ".join(f"{kind}{number * word % 37}" for word in range(60))
            (tmp_path / kind / f"{number}.md").write_text(f"# {kind} {number}\n\n{words}\n")
    values = recipe(
        data={"sources": str(tmp_path / "prose"), "min_documents": 1},
        mixture=[{"name": "own", "weight": 3},
                 {"name": "code", "data": {"sources": str(tmp_path / "code"), "min_documents": 1}}],
        train={"steps": 3, "batch_size": 2, "sequence_length": 32, "device": "cpu", "compile": False,
               "precision": "fp32", "pack_buffer": 4, "length_stages": [100]},
    )  # fmt: skip
    done = run(Recipe.model_validate(values), tmp_path / "runs")
    index = read_json(done.artefacts["mixture"] / "index.json")
    assert [part["name"] for part in index["parts"]] == ["own", "code"]
    assert [part["tokens"] for part in index["parts"]] == [
        f"../{done.artefacts[name].name}" for name in ("tokens", "tokens_code")
    ]
    assert (done.artefacts["train"] / "model" / "config.json").is_file()


def test_more_steps_than_the_mixture_has(tmp_path: Path) -> None:
    from soma.train.config import TrainConfig
    from soma.train.trainer import check_length

    loader = TokenLoader(mix(tmp_path, a={"epochs": 2}, b={"epochs": 1}, c={"epochs": 1}), "train", 10, 4)
    config = TrainConfig(batch_size=4, sequence_length=10)
    check_length(config, loader, 40)  # 160 sequences
    with pytest.raises(UserError, match="41 steps of 4 sequences are asked for, the mixture has 160"):
        check_length(config, loader, 41)

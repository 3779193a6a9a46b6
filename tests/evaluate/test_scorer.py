"""A language model as the scorer of a recipe's quality filter."""

import json
import pickle
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from soma.base.errors import UserError
from soma.data.config import DataConfig
from soma.evaluate.perplexity import score_texts, to_perplexity
from soma.evaluate.scorer import PerplexityScorer, open_model_scorer
from soma.model.hub import load_model
from soma.model.tokenizer import Tokenizer
from soma.stages.data import corpus_stage, documents_stage
from soma.stages.stage import Build
from tests.tiny import TEXT, make_model

TEXTS = [TEXT, "hello world!", TEXT * 40]


def test_it_is_the_perplexity_of_evaluation(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    scorer = pickle.loads(pickle.dumps(PerplexityScorer(str(folder))))
    expected = score_texts(load_model(folder), Tokenizer.load(folder), TEXTS, sequence_length=512, stride=512)
    assert scorer.score(TEXTS) == pytest.approx([to_perplexity(one.nats, len(one.ids)) for one in expected], rel=1e-6)
    assert pickle.loads(pickle.dumps(scorer)).loaded is None
    assert open_model_scorer("words:x") is open_model_scorer(None) is None
    with pytest.raises(UserError, match="is no model folder"):
        PerplexityScorer(str(tmp_path / "tokenizer"))


def test_a_recipe_filters_by_it(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    rows = [f"{TEXT} {number}" for number in range(8)] + ["\\x12 " + "qzx" * 30]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    scores = PerplexityScorer(str(folder)).score(rows)
    limit = (sorted(scores)[4] + sorted(scores)[5]) / 2
    config = DataConfig(
        sources=str(tmp_path / "in.jsonl"), min_documents=1, dedup={"near": False}, validation_fraction=0.0,
        filters={"quality": {"scorer": f"model:{folder}", "max_score": limit}},
    )  # type: ignore[arg-type]  # fmt: skip
    documents, corpus = documents_stage(config), corpus_stage(config)
    for name, stage, inputs in (
        ("documents", documents, {}),
        ("corpus", corpus, {"documents": tmp_path / "documents"}),
    ):
        (tmp_path / name).mkdir()
        stage.build(Build(tmp_path / name, tmp_path / f"{name}-work", inputs, None))  # type: ignore[arg-type]
    kept = {
        row["text"] for path in (tmp_path / "corpus").glob("train-*.parquet") for row in pq.read_table(path).to_pylist()
    }
    assert kept == {row for row, score in zip(rows, scores, strict=True) if score <= limit}
    before = documents.fingerprint()
    (folder / "generation_config.json").write_text("{}\n")
    assert documents.fingerprint() != before

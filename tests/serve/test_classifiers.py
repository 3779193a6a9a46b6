"""Encoders with a head, held to transformers with random weights: as modules, and behind rerank, score and V2."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from http_tools import post
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Inner
from tokenizers import models, normalizers, pre_tokenizers, processors

from soma.base.errors import UserError
from soma.engine.embed import Classifier, Embedder, load_embedder
from soma.model.classifier import is_classifier
from soma.serve.pairs import cut, encode_pairs
from soma.serve.running import running_service
from soma.serve.v2.config import build_encoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "fox", "hello", "world", "jump", "##s", "##ing", "dog"]
SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 24, "initializer_range": 0.3,
}  # fmt: skip
QUERY = "hello fox"
DOCUMENTS = ["the dog jumps", "world", "the fox jumping the dog hello", "hello fox"]
KINDS: dict[str, Any] = {
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
    "xlm-roberta": (transformers.XLMRobertaConfig, transformers.XLMRobertaForSequenceClassification),
}


def make(folder: Path, kind: str = "bert", labels: int = 1, **more: Any) -> Path:
    """A random classifier with a WordPiece tokenizer, as transformers saves it."""
    torch.manual_seed(3)
    config, model = KINDS[kind]
    special = {"pad_token_id": 1, "type_vocab_size": 1} if kind == "xlm-roberta" else {}
    made = model(config(**{**SHAPE, **special, "num_labels": labels, **more}))
    with torch.no_grad():
        for tensor in made.classifier.parameters():
            tensor.copy_(torch.randn(tensor.shape) * 0.3)
    made.save_pretrained(folder)
    inner = Inner(models.WordPiece({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"cls_token": "[CLS]", "sep_token": "[SEP]"}))
    return folder


def oracle(folder: Path, pairs: list[tuple[str, str]], kind: str = "bert") -> np.ndarray:
    """transformers' logits, each pair alone."""
    model = KINDS[kind][1].from_pretrained(folder).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    rows = []
    for one, two in pairs:
        most = 24 if kind == "bert" else 22
        given = tokenizer(one, two, truncation="longest_first", max_length=most, return_token_type_ids=True)
        segments = given["token_type_ids"] if kind == "bert" else [0] * len(given["input_ids"])
        with torch.no_grad():
            rows.append(model(torch.tensor([given["input_ids"]]), token_type_ids=torch.tensor([segments])).logits[0])
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [1, 3])
def test_logits_are_those_of_transformers(tmp_path: Path, kind: str, labels: int) -> None:
    """Pairs of all lengths in one padded batch, fp32, to 1e-4; a wrong segment is seen."""
    folder = make(tmp_path, kind, labels)
    assert is_classifier(folder)
    model = load_embedder(folder, precision="fp32")
    assert isinstance(model, Classifier)
    assert model.max_length == (24 if kind == "bert" else 22)
    inner = Inner.from_file(str(folder / "tokenizer.json"))
    pairs = [(QUERY, each) for each in [*DOCUMENTS, "the fox jumps " * 9]] + [("dog " * 30, "hello " * 40)]
    prompts, firsts = encode_pairs(inner, pairs, model.max_length)
    assert max(map(len, prompts)) == model.max_length
    with torch.inference_mode():
        logits = model.logits(prompts, firsts).numpy()
        wrong = model.logits(prompts, [len(ids) for ids in prompts]).numpy()
    wanted = oracle(folder, pairs, kind)
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
    assert (kind == "bert") == bool(np.abs(wrong - wanted).max() > 1e-2)
    scores = model.embed(prompts, firsts)
    exact = torch.tensor(wanted)
    np.testing.assert_allclose(scores, exact.sigmoid() if labels == 1 else exact.softmax(-1), atol=1e-4)
    model.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("cross") / "cross")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with running_service(folder, precision="fp32") as url:
        yield url


def test_rerank_and_score_by_a_cross_encoder(url: str, folder: Path) -> None:
    wanted = 1 / (1 + np.exp(-oracle(folder, [(QUERY, each) for each in DOCUMENTS])[:, 0]))
    status, value = post(url, "/v1/rerank", {"model": "cross", "query": QUERY, "documents": DOCUMENTS})
    assert status == 200, value
    assert [each["index"] for each in value["results"]] == np.argsort(-wanted).tolist()
    found = {each["index"]: each["relevance_score"] for each in value["results"]}
    np.testing.assert_allclose([found[place] for place in range(4)], wanted, atol=1e-4)
    assert value["usage"]["prompt_tokens"] == sum(2 + len(each.split()) + 3 for each in DOCUMENTS) + 2
    status, value = post(url, "/v1/score", {"model": "cross", "text_1": QUERY, "text_2": DOCUMENTS})
    np.testing.assert_allclose([each["score"] for each in value["data"]], wanted, atol=1e-4)
    there = oracle(folder, [("world", "dog")])[0, 0]
    _, value = post(url, "/v1/score", {"model": "cross", "text_1": "world", "text_2": "dog"})
    assert value["data"][0]["score"] == pytest.approx(1 / (1 + np.exp(-there)), abs=1e-4)


def test_what_a_classifier_does_not_do(url: str) -> None:
    for path, body in (
        ("/v1/embeddings", {"input": "hello"}), ("/v1/completions", {"prompt": "hello"}),
        ("/v1/rerank", {"query": QUERY, "documents": ["dog"], "model": "other"}),
    ):  # fmt: skip
        status, value = post(url, path, {"model": "cross", **body})
        assert status in (400, 404), value
    assert "classifier" in post(url, "/v1/embeddings", {"model": "cross", "input": "hello"})[1]["error"]["message"]


def tensor(name: str, texts: list[str]) -> dict[str, Any]:
    return {"name": name, "datatype": "BYTES", "shape": [len(texts)], "data": texts}


def test_classes_over_v2(url: str, folder: Path) -> None:
    """The served model, which has one class."""
    pair = {"inputs": [tensor("text", [QUERY] * 4), tensor("text_pair", DOCUMENTS)]}
    status, value = post(url, "/v2/models/cross/infer", pair)
    assert status == 200, value
    wanted = 1 / (1 + np.exp(-oracle(folder, [(QUERY, each) for each in DOCUMENTS])))
    np.testing.assert_allclose(np.reshape(value["outputs"][0]["data"], (4, 1)), wanted, atol=1e-4)
    uneven = {"inputs": [tensor("text", [QUERY]), tensor("text_pair", DOCUMENTS)]}
    assert post(url, "/v2/models/cross/infer", uneven)[0] == 400


@pytest.mark.slow
def test_named_classes_beside_the_served_model(folder: Path, tmp_path: Path) -> None:
    names = {0: "bad", 1: "so-so", 2: "good"}
    three = make(tmp_path / "three", labels=3, id2label=names)
    (tmp_path / "models.yaml").write_text("models: {three: {encoder: three}}\n")
    with running_service(folder, precision="fp32", models=str(tmp_path / "models.yaml")) as beside:
        ask = {"inputs": [tensor("text", ["the dog"])], "outputs": [{"name": "scores"}]}
        status, value = post(beside, "/v2/models/three/infer", ask)
        assert status == 200, value
        scores = np.array(value["outputs"][0]["data"])
        ids = [2, 5, 12, 3]
        with torch.no_grad():
            logits = KINDS["bert"][1].from_pretrained(three).eval()(torch.tensor([ids])).logits[0]
        np.testing.assert_allclose(scores, logits.softmax(-1).numpy(), atol=5e-3)  # bf16 where the machine has it
        ask["outputs"] = [{"name": "scores", "parameters": {"classification": 1}}]
        best = post(beside, "/v2/models/three/infer", ask)[1]["outputs"][0]["data"]
        assert best[0].endswith(f":{int(scores.argmax())}:{names[int(scores.argmax())]}")


def test_labels_of_an_encoder(tmp_path: Path) -> None:
    three = make(tmp_path / "three", labels=3, id2label={0: "bad", 1: "so-so", 2: "good"})
    built = build_encoder(str(three), tmp_path)
    assert list(built.labels) == ["bad", "so-so", "good"]
    built.close()


def test_folders_that_are_wrong(tmp_path: Path) -> None:
    folder = make(tmp_path / "one")
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing: classifier\.bias"):
        load_embedder(folder)
    other = make(tmp_path / "two", sbert_ce_default_activation_function="torch.nn.modules.activation.GELU")
    with pytest.raises(UserError, match="'GELU' is not supported"):
        load_embedder(other)
    plain = make(tmp_path / "three", sbert_ce_default_activation_function="torch.nn.modules.linear.Identity")
    model = load_embedder(plain, precision="fp32")
    prompts, firsts = encode_pairs(Inner.from_file(str(plain / "tokenizer.json")), [(QUERY, "dog")], 24)
    np.testing.assert_allclose(model.embed(prompts, firsts), oracle(plain, [(QUERY, "dog")]), atol=1e-4)
    model.close()


def test_an_encoder_of_the_roberta_family(tmp_path: Path) -> None:
    """Positions begin behind the padding's id."""
    torch.manual_seed(0)
    config = transformers.XLMRobertaConfig(**{**SHAPE, "pad_token_id": 1, "type_vocab_size": 1})
    reference = transformers.XLMRobertaModel(config).eval()
    reference.save_pretrained(tmp_path)
    model = load_embedder(tmp_path, precision="fp32")
    assert type(model) is Embedder
    ids = [2, 5, 12, 3]
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(reference(torch.tensor([ids])).last_hidden_state[0].mean(0), dim=-1)
    np.testing.assert_allclose(model.embed([ids, [*ids, *ids]])[0], wanted.numpy(), atol=1e-4)
    model.close()


@pytest.mark.parametrize(
    ("lengths", "kept"), [((10, 90), (10, 40)), ((40, 90), (25, 25)), ((90, 3), (47, 3)), ((20, 30), (20, 30))]
)
def test_who_is_cut(lengths: tuple[int, int], kept: tuple[int, int]) -> None:
    assert cut(*lengths, 50) == kept

"""Speech acts: labels, rules, the model on dialogues that the test makes, the mix of a corpus against its traffic."""

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from soma.base.errors import UserError
from soma.cli import app
from soma.data.acts.acts import ACTS, LEARNED, Turn
from soma.data.acts.dialogues import clean, damsl_act, read_dialogues
from soma.data.acts.mix import Mix, compare, count, missing, shown, wilson, write_page
from soma.data.acts.read import read_turns, said, sentences
from soma.data.acts.rules import ruled
from soma.model.act_words import features
from soma.model.acts import ActConfig, load_acts, save_acts
from soma.train.acts import ActTraining, f1_scores, train_acts

CASES = Path(__file__).parent / "speech_act_cases.jsonl"
HOSTILE = "<script>alert(1)</script> is it so?"


# --- Labels ---


def test_damsl_tags_map_to_acts() -> None:
    expected = {
        "sd": "assertive", "sv^e": "assertive", "sd(^q)": "assertive", "sd,o@": "assertive",
        "qy^d": "question", "qh": "question", "ad^t": "directive", "co^t": "commissive", "ft": "expressive",
        "fc^m": "expressive", "b": None, "b^r": None, "%": None, "+@": None, "^q": None, "x": None,
    }  # fmt: skip
    assert {tag: damsl_act(tag) for tag in expected} == expected
    assert clean("{D Well, } [ I, + I ] see # that. # /") == "Well, I, I see that."
    assert clean("<Laughter> Uh-huh, -/") == "Uh-huh,"


def test_dialogues_are_read_and_broken_ones_named(tmp_path: Path) -> None:
    daily, calls = tmp_path / "a.txt", tmp_path / "switchboard.zip"
    daily.write_text(
        "Hello . __eou__ Why ? __eou__ Sit down . __eou__ I will . __eou__ Great ! __eou__\t1\t1 2 3 4 1\t0 0 0 0 4\n"
    )
    (turns,) = read_dialogues(daily).values()
    assert [(turn.speaker, turn.act) for turn in turns] == list(
        zip("ABABA", ["assertive", "question", "directive", "commissive", "expressive"], strict=True)
    )
    with zipfile.ZipFile(calls, "w") as archive:
        archive.writestr(
            "switchboard/discourse",
            "qy A.1 utt1: Is it, {F uh, } done? /\n x B.2 utt1: <Laughter>\n b B.2 utt2: Yeah. /\n",
        )
    (turns,) = read_dialogues(calls).values()
    assert list(turns) == [Turn("A", "Is it, uh, done?", "question"), Turn("B", "Yeah.", None)]
    daily.write_text("Hello . __eou__\t1\t1 2\t0 0\n")
    with pytest.raises(UserError, match=r"a.txt, line 1: 1 turns"):
        read_dialogues(daily)
    with pytest.raises(UserError, match="no labelled dialogues"):
        read_dialogues(tmp_path / "none.zip")


def test_shared_dialogues(shared_data: Any) -> None:
    folder = shared_data("speech_acts")
    found = [
        turn
        for name in ("en_dev_human.txt", "switchboard.zip")
        for d in read_dialogues(folder / name).values()
        for turn in d
    ]
    counts = {act: sum(turn.act == act for turn in found) for act in LEARNED}
    assert sum(turn.act is None for turn in found) > 2000
    assert min(counts.values()) > 500
    assert not any(mark in turn.text for turn in found for mark in ("{F", "__eou__", "utt1"))


# --- Rules ---


@pytest.mark.parametrize("act", ["declaration", "verdictive"])
def test_rules_on_the_written_cases(act: str) -> None:
    """What docs/speech_acts.md says of precision and recall stays so."""
    rows = [row for row in map(json.loads, CASES.read_text().splitlines()) if row["for"] == act]
    assert len({row["text"] for row in rows}) == 200
    said_so, true = [ruled(row["text"]) == act for row in rows], [row["act"] == act for row in rows]
    both = sum(a and b for a, b in zip(said_so, true, strict=True))
    assert sum(true) == 100
    assert both / sum(said_so) >= 0.97
    assert both / sum(true) >= 0.95


def test_rules_by_sentence_and_without_reports() -> None:
    assert ruled("Thank you all. The meeting is adjourned.") == "declaration"
    assert ruled("You’re fired!") == "declaration"
    assert ruled("Was I fired? He said the meeting is adjourned.") is None
    assert ruled("We find the defendant guilty.") == "verdictive"
    assert ruled("") is None


# --- The model ---


def made_dialogues(count: int, seed: int) -> dict[str, list[Turn]]:
    """Acts that words tell, but for "okay", which is commissive after a directive and expressive after all else."""
    generator = random.Random(seed)
    things = ["the door", "a letter", "my car", "that song", "the report", "some bread"]
    forms = {"assertive": "{} is here .", "question": "where is {} ?", "directive": "please bring me {} ."}
    found = {}
    for number in range(count):
        turns: list[Turn] = []
        for at in range(6):
            act = generator.choice(list(forms))
            if at % 2 and turns:
                turns.append(Turn("B", "okay", "commissive" if turns[-1].act == "directive" else "expressive"))
            else:
                turns.append(Turn("A", forms[act].format(generator.choice(things)), act))
        found[str(number)] = turns
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    config = ActConfig(acts=list(LEARNED), buckets=4096, hidden_size=32, dropout=0.1)
    training = ActTraining(epochs=4, feature_dropout=0.1)
    classifier, history = train_acts(made_dialogues(120, 1), made_dialogues(20, 2), config, training)
    assert history[-1]["macro_f1"] > 0.95
    folder = tmp_path_factory.mktemp("acts")
    save_acts(classifier.model, folder)
    return folder


def test_model_learns_words_and_the_turn_before(model: Path) -> None:
    scorer = load_acts(model)
    held = list(made_dialogues(30, 3).values())
    found = scorer.probabilities(held)
    labels = np.array([LEARNED.index(str(turn.act)) for turns in held for turn in turns])
    assert f1_scores(labels, np.concatenate(found).argmax(1), 5).mean() > 0.95
    assert np.allclose(np.concatenate(found).sum(1), 1, atol=1e-5)
    # Negative control: with the turns before taken away, "okay" cannot be told apart.
    alone = scorer.probabilities([[turn] for turns in held for turn in turns])
    assert f1_scores(labels, np.concatenate(alone).argmax(1), 5).mean() < 0.9


def test_model_sees_only_what_was_said_and_long_dialogues_are_the_same_in_pieces(model: Path) -> None:
    scorer = load_acts(model)
    turns = [turn for dialogue in made_dialogues(40, 4).values() for turn in dialogue]
    assert len(turns) > 200
    whole = scorer.probabilities([turns])[0]
    early = scorer.probabilities([turns[:100]])[0]
    assert np.allclose(whole[:100], early, atol=1e-5)  # what comes later changes nothing
    with torch.inference_mode():
        from soma.model.acts import batch_of, words_of

        words = words_of(turns, scorer.model.config.buckets, scorer.idf)
        plain = torch.softmax(scorer.model(batch_of([words])), -1)[0].numpy()
    assert np.allclose(whole, plain, atol=1e-5)
    assert [row.shape for row in scorer.probabilities([[], turns[:1]])] == [(0, 5), (1, 5)]
    odd = scorer.probabilities([[Turn("A", ""), Turn("A", "zzz 😀 \ud83d")]])[0]
    assert np.isfinite(odd).all()


def test_model_folders_that_are_none(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model of speech acts there"):
        load_acts(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="not a model of speech acts"):
        load_acts(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"acts": list(LEARNED), "buckets": 8}))
    with pytest.raises(UserError, match="does not fit its config"):
        load_acts(tmp_path)
    with pytest.raises(UserError, match="no turn is labelled expressive"):
        train_acts({"a": [Turn("A", "x", act) for act in LEARNED[:4]]}, {}, ActConfig(acts=list(LEARNED), buckets=64))


def test_features_are_stable() -> None:
    assert features("Don ’ t go!", 1 << 17).tolist() == features("don't go!", 1 << 17).tolist()
    assert len(set(features("a b a b", 1 << 17).tolist())) == len(features("a b a b", 1 << 17))


def test_f1_by_hand() -> None:
    """Class 0: 1 of 2 labelled and of 1 predicted, 2/3; class 1: 1 of 1 and of 2, 2/3; class 2: none at all, 0."""
    assert f1_scores(np.array([0, 0, 1]), np.array([0, 1, 1]), 3) == pytest.approx([2 / 3, 2 / 3, 0])


# --- The mix ---


class Words:
    """A scorer by punctuation."""

    name = "words"

    def probabilities(self, dialogues: Any) -> list[np.ndarray]:
        def row(text: str) -> list[float]:
            act = "question" if text.endswith("?") else "directive" if text.startswith("Please") else "assertive"
            return [0.9 if one == act else 0.025 for one in LEARNED]

        return [np.array([row(turn.text) for turn in turns]) for turns in dialogues]


def test_rows_of_every_shape() -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}], "completion": "Yes."},
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]},
        {"messages": json.dumps([{"role": "user", "content": "Hi?"}]), "completion": "Yes.", "prompt": None},
        {"instruction": "Hi?", "input": "", "output": "Yes."}, {"prompt": "Hi?", "completion": "Yes."},
    ]  # fmt: skip
    for row in rows:
        assert list(said(row)) == [("user", "Hi?"), ("assistant", "Yes.")], row
    assert list(said({"text": "[x] y"})) == [("text", "[x] y")]
    text = "One. Two?\nthree\n```py\ncode. more.\n```\n42.\nLast"
    assert [turn.text for turn in sentences("user", text)] == ["One.", "Two?", "three", "Last"]


def test_mix_says_what_is_missing(tmp_path: Path) -> None:
    corpus = [[Turn("user", "It is so."), Turn("assistant", "Please wait.")]] * 90 + [[Turn("user", HOSTILE)]] * 10
    traffic = [[Turn("user", f"Please do {n}.")] for n in range(50)] + [[Turn("user", "You are fired.")]] * 50
    report = compare(count("corpus", corpus, Words()), count("traffic", traffic, Words()), "words")
    assert report["compared"] == "user"
    assert report["corpus"]["shares"]["question"]["share"] == 0.1
    assert report["corpus"]["speakers"]["assistant"]["directive"] == 90
    assert {one["act"] for one in report["missing"]} == {"directive", "declaration"}
    assert report["corpus"]["examples"]["question"] == [HOSTILE]  # each text once, however often it is said
    assert report["missing"][0]["needed"] == 100  # 50 of 100 there, none of 100 here
    assert "Please do" in report["missing"][0]["examples"][0] + report["missing"][1]["examples"][0]
    assert any("missing in the corpus" in line for line in shown(report))
    write_page(tmp_path / "page.html", report)
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "You are fired." in page
    same = compare(count("a", corpus, Words()), count("b", corpus, Words()), "words")
    assert same["missing"] == []


def test_shares_have_intervals() -> None:
    assert wilson(10, 100) == pytest.approx([0.0552, 0.1744], abs=1e-4)
    assert wilson(0, 0) == [0.0, 1.0]
    side = Mix("none").figures("all")
    assert all(side["shares"][act]["share"] == 0 for act in ACTS)
    few = {"shares": {act: {"count": 0, "share": 0.0, "interval": wilson(0, 3)} for act in ACTS}}
    more = {
        "shares": few["shares"] | {"question": {"count": 1, "share": 0.33, "interval": wilson(1, 3)}},
        "examples": {},
    }
    assert missing(few, more) == []  # three sentences say nothing


def test_the_command(model: Path, tmp_path: Path) -> None:
    corpus, requests = tmp_path / "corpus.jsonl", tmp_path / "log"
    corpus.write_text(
        "".join(json.dumps({"instruction": "the door is here .", "output": "okay"}) + "\n" for _ in range(40))
    )
    requests.mkdir()
    body = {"messages": [{"role": "user", "content": "where is my car ?"}]}
    (requests / "a.jsonl").write_text("".join(json.dumps(body) + "\n" for _ in range(40)))
    out, page = tmp_path / "report.json", tmp_path / "page.html"
    command = ["data", "acts", str(corpus), "--model", str(model), "--traffic", str(requests), "--out", str(out)]
    result = CliRunner().invoke(app, [*command, "--page", str(page)])
    assert result.exit_code == 0, result.output
    assert [one["act"] for one in json.loads(out.read_text())["missing"]] == ["question"]
    assert "where is my car ?" in page.read_text()
    for text, words in (("{", "line 1: not valid JSON"), ("{}\n", "no row with messages")):
        corpus.write_text(text)
        with pytest.raises(UserError, match=words):
            list(read_turns(corpus))
    with pytest.raises(UserError, match="file there"):
        list(read_turns(tmp_path / "none"))


def test_the_training_command(tmp_path: Path) -> None:
    numbers = {"assertive": "1", "question": "2", "directive": "3", "commissive": "4", "expressive": "1"}
    lines = []
    for turns in made_dialogues(30, 5).values():
        texts = " __eou__ ".join(turn.text for turn in turns) + " __eou__"
        acts = " ".join(numbers[str(turn.act)] for turn in turns)
        lines.append(f"{texts}\t1\t{acts}\t" + " ".join("4" if turn.act == "expressive" else "0" for turn in turns))
    source, out = tmp_path / "dialogues.txt", tmp_path / "model"
    source.write_text("\n".join(lines) + "\n")
    result = CliRunner().invoke(app, ["data", "train-acts", str(source), "--out", str(out), "--epochs", "1"])
    assert result.exit_code == 0, result.output
    assert "27 dialogues" in result.output
    assert load_acts(out).acts == LEARNED

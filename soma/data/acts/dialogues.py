"""Labelled dialogues: DailyDialog's four acts and Switchboard's DAMSL tags, mapped to the seven.

| ours | DailyDialog (Li et al. 2017) | Switchboard DAMSL (Jurafsky et al. 1997) |
|---|---|---|
| assertive | inform, no emotion | sd sv (statements), ny nn na ng no nd arp ar (answers), aa aap am (agreement, maybe), h, bf (summary) |
| question | question | qy qw qo qr qrr qh (all questions), br (what?), bh (really?) |
| directive | directive | ad |
| commissive | commissive | cc co |
| expressive | inform with an emotion other than none | ba (appreciation), bd, by (sympathy), fa fc fe fo fp ft fw (conventional) |
| none | | b bk (listening signals), % (abandoned), x (no speech), + (continued), ^q ^2 ^h ^g t1 o (quoted, finished, held) |

Marks after a tag (`^e`, `^r`, `^t`, `(^q)`, `@`) do not change its act. What continues an utterance (`+`) has no act of its own.
"""  # noqa: E501

import re
import zipfile
from pathlib import Path

from soma.base.errors import UserError
from soma.data.acts.acts import Dialogue, Turn

DAILY = {"1": "assertive", "2": "question", "3": "directive", "4": "commissive"}
TAGS = {
    "assertive": "sd sv ny nn na ng no nd arp ar aa aap am h bf", "question": "qy qw qo qr qrr qh br bh",
    "directive": "ad", "commissive": "cc co", "expressive": "ba bd by fa fc fe fo fp ft fw",
}  # fmt: skip
DAMSL = {tag: act for act, tags in TAGS.items() for tag in tags.split()}
UTTERANCE = re.compile(r"\s*(\S+)\s+([AB])\.\d+ utt\d+:\s*(.*)")
NOISE = re.compile(r"<<?[^>]*>>?|\{[A-Z] |[}\[\]+#/]|\(\(|\)\)|--|-(?=\s|/|$)")


def read_dialogues(path: Path) -> dict[str, Dialogue]:
    """Dialogues by name, from a file of (X)DailyDialog (`.txt`) or NLTK's `switchboard.zip`. Raises UserError."""
    try:
        found = read_switchboard(path) if path.suffix == ".zip" else read_daily(path)
    except (OSError, zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no labelled dialogues that can be read ({error})") from None
    if not found:
        raise UserError(f"{path}: no dialogue in it")
    return found


def read_daily(path: Path) -> dict[str, Dialogue]:
    """A dialogue a line: turns ended by `__eou__`, topic, acts, emotions, between tabs."""
    found: dict[str, Dialogue] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        cells = line.split("\t")
        texts = [text.strip() for text in cells[0].split("__eou__") if text.strip()]
        acts, feelings = (cell.split() for cell in (cells[2:4] if len(cells) == 4 else ["", ""]))
        if not len(texts) == len(acts) == len(feelings) or not set(acts) <= DAILY.keys():
            raise UserError(f"{path}, line {number}: {len(texts)} turns with acts {' '.join(acts)!r:.60}")
        found[f"{path.stem}-{number}"] = [
            Turn("AB"[at % 2], text, "expressive" if act == "1" and feeling != "0" else DAILY[act])
            for at, (text, act, feeling) in enumerate(zip(texts, acts, feelings, strict=True))
        ]
    return found


def read_switchboard(path: Path) -> dict[str, Dialogue]:
    """The calls of `switchboard/discourse`, an utterance a turn, without marks of noise and disfluency."""
    with zipfile.ZipFile(path) as archive:
        text = archive.read("switchboard/discourse").decode("utf-8")
    found: dict[str, Dialogue] = {}
    for number, block in enumerate(text.split("\n\n"), 1):
        turns = []
        for line in block.splitlines():
            match = UTTERANCE.match(line)
            words = clean(match[3]) if match else ""
            if match and words:
                turns.append(Turn(match[2], words, damsl_act(match[1])))
        if turns:
            found[f"switchboard-{number}"] = turns
    return found


def clean(text: str) -> str:
    """An utterance without Switchboard's marks: `{D Well, } [ I, + I ] see. /` → `Well, I, I see.`"""
    return " ".join(NOISE.sub(" ", text).split()).replace(" ,", ",").replace(" .", ".")


def damsl_act(tag: str) -> str | None:
    """The act of a tag of Switchboard, None where it has none: `sd^e` → assertive, `qy^d` → question, `b` → None."""
    base = re.sub(r"\(\^q\)|\^\w+|[@*\"]", "", re.split(r"[,;]", tag)[0])
    return DAMSL.get(base)

"""Evol-Instruct (Xu et al. 2023, arXiv:2304.12244): tasks made harder or rarer, epoch by epoch, and failures
eliminated.

In each epoch every task of the pool is rewritten by an operator drawn at random: one of five in depth, or breadth. The
evolved task is eliminated (section 3.2 of the paper) where 1. it gains nothing over the one before (the model is
asked); 2. its answer says sorry in fewer than 80 words; 3. its answer has nothing but punctuation and stop words; 4. it
copies words of our prompt. Then the task before stays in the pool for the next epoch, else the evolved one takes its
place.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from soma.data.instruct.generate import prompts
from soma.data.instruct.generate.caller import Answer, Caller, Question
from soma.data.instruct.generate.output import Made
from soma.data.instruct.generate.prompts import Operator
from soma.data.instruct.generate.settings import Settings

SORRY_WORDS = 80
WORD = re.compile(r"[^\W_]+")
NAMES = "given|new|harder|rewritten|created"
COPIED = re.compile(
    rf"#\s*(?:(?:{NAMES})\s+)?(?:task|prompt)\s*#|\b(?:given|rewritten|created|harder) (?:task|prompt)\b", re.IGNORECASE
)
STOP_WORDS = frozenset(
    WORD.findall(
        "a about after again all also am an and any are as at be because been before being but by can could did do "
        "does for from had has have he her here him his how i if in into is it its just me more most my no nor not "
        "now of off on once only or other our out over own same she so some such than that the their them then there "
        "these they this those through to too under until up very was we were what when where which while who why "
        "will with would you your"
    )
)


@dataclass
class Line:
    """A task of the pool: its words now, the row that they came from, and what was asked last."""

    id: str
    instruction: str
    operator: Operator = "breadth"
    evolved: str = ""


def generate(seeds: Sequence[tuple[str, str]], settings: Settings, caller: Caller) -> tuple[list[Made], Counter[str]]:
    """Rows evolved from `seeds` (id, instruction), and how many were eliminated by which condition.

    Ends with the budget, `settings.rows` rows, or after `settings.epochs` epochs.
    """
    pool = [Line(id, instruction) for id, instruction in seeds]
    made: list[Made] = []
    dropped: Counter[str] = Counter()
    for epoch in range(settings.epochs):
        random = Random(f"{settings.seed} {epoch}")
        for line in pool:
            line.operator = random.choice(prompts.OPERATORS)
        for start in range(0, len(pool), settings.round):
            if caller.over or (settings.rows is not None and len(made) >= settings.rows):
                return made[: settings.rows], dropped
            group = pool[start : start + settings.round]
            made += _evolve(group, f"epoch {epoch} task", start, caller, dropped)
    return made[: settings.rows], dropped


Step = tuple[Line, str, list[Answer]]


def _evolve(group: list[Line], place: str, start: int, caller: Caller, dropped: Counter[str]) -> list[Made]:
    """The rows of some tasks, each step asked for all of them at once."""
    steps: list[Step] = [(line, f"{place} {start + index}", []) for index, line in enumerate(group)]
    steps = _ask(steps, "evolve", lambda line: prompts.evolve(line.instruction, line.operator), caller, dropped)
    kept = []
    for line, at, answers in steps:
        line.evolved = cleaned(answers[-1].text or "")
        if reason := "empty" if not line.evolved else "copied" if COPIED.search(line.evolved) else None:
            dropped[reason] += 1
        else:
            kept.append((line, at, answers))
    asked = _ask(kept, "same", lambda line: prompts.same_task(line.instruction, line.evolved), caller, dropped)
    steps = [step for step in asked if not _is_same(step, dropped)]
    rows = []
    for line, _, answers in _ask(steps, "answer", lambda line: line.evolved, caller, dropped):
        output = (answers[-1].text or "").strip()
        if reason := failed_answer(output):
            dropped[reason] += 1
            continue
        row = {"instruction": line.evolved, "input": "", "output": output}
        rows.append(Made.of(row, line.operator, [line.id], answers, caller.settings.model))
        line.id, line.instruction = rows[-1].row["id"], line.evolved
    return rows


def _ask(steps: list[Step], name: str, prompt: object, caller: Caller, dropped: Counter[str]) -> list[Step]:
    """The steps that have an answer now."""
    assert callable(prompt)
    asked = [Question(f"{at} {name}", prompt(line)) for line, at, _ in steps]
    found = []
    for (line, at, answers), answer in zip(steps, caller.ask(asked), strict=True):
        if answer is None:
            break
        if answer.text is None:
            dropped["refused"] += 1
        else:
            found.append((line, at, [*answers, answer]))
    return found


def _is_same(step: Step, dropped: Counter[str]) -> bool:
    same = gains_nothing(step[2][-1].text or "")
    dropped["no_gain"] += same
    return same


# --- What is taken of an answer ---


def cleaned(text: str) -> str:
    """The evolved task without quotes around it."""
    text = text.strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] == '"' else text


def gains_nothing(said: str) -> bool:
    """Whether the judge says equal (`not equal` and `different` are not)."""
    said = said.lower()
    return "equal" in said and "not equal" not in said and "unequal" not in said and "different" not in said


def failed_answer(text: str) -> str | None:
    """`sorry` or `no_words` where an answer shows that its task cannot be answered, else None."""
    words = WORD.findall(text.lower())
    if "sorry" in words and len(words) < SORRY_WORDS:
        return "sorry"
    return "no_words" if all(word in STOP_WORDS for word in words) else None

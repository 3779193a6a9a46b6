"""Self-Instruct (Wang et al. 2022, arXiv:2212.10560): a pool of tasks grows by what a model makes of samples of it.

Rounds: `round` prompts, each with six seed tasks and two made ones; the new instructions are filtered; for each that is
novel the model says whether it is a classification and gives instances, label first for classification. The prompts of
a round depend on the pool before it, so a round's requests go out at once and the result is the same for any
concurrency.
"""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from soma.data.instruct.generate import prompts
from soma.data.instruct.generate.caller import Answer, Caller, Question
from soma.data.instruct.generate.output import Made
from soma.data.instruct.generate.rouge import Novelty
from soma.data.instruct.generate.settings import Settings

SEEDS_SHOWN, MADE_SHOWN = 6, 2
KINDS_SHOWN = 8
FEWEST_WORDS, MOST_WORDS = 4, 150
# Tasks of which a language model that only writes cannot do its part; the paper's list.
KEYWORDS = re.compile(
    r"\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go to|videos?|audio|music|flowcharts?|diagrams?)\b", re.I
)
ITEM = re.compile(r"^\s*\d+\s*[.)]\s*", re.MULTILINE)
PUNCTUATION = re.compile(r"[^\w\s]|_")
FORM = re.compile(r"^\s*(Input|Output|Label)\s*:[ \t]*", re.MULTILINE | re.IGNORECASE)
NO_INPUT = re.compile(r"(<?\s*no\s*-?\s*input\s*>?|none|n/?a|-)\.?", re.IGNORECASE)


@dataclass
class Pool:
    """The tasks so far, and what was turned down, by reason."""

    seeds: list[dict[str, Any]]
    made: list[Made] = field(default_factory=list)
    novelty: Novelty = field(default_factory=Novelty)
    dropped: Counter[str] = field(default_factory=Counter)


def generate(seeds: Sequence[dict[str, Any]], settings: Settings, caller: Caller) -> tuple[list[Made], Counter[str]]:
    """Tasks made from `seeds` (rows of the schema `seeds` with `id`), and how many were turned down for what.

    Ends with the budget, with `settings.rows` tasks, or after `idle_rounds` rounds without any new one.
    """
    pool = Pool(list(seeds))
    for seed in seeds:
        pool.novelty.add(seed["instruction"])
    number = idle = 0
    while not caller.over and idle < settings.idle_rounds and not _enough(pool, settings):
        before = len(pool.made)
        _round(pool, number, settings, caller)
        idle = 0 if len(pool.made) > before else idle + 1
        number += 1
    return pool.made[: settings.rows], pool.dropped


def _enough(pool: Pool, settings: Settings) -> bool:
    return settings.rows is not None and len(pool.made) >= settings.rows


@dataclass
class Task:
    """An instruction on its way to be a row."""

    place: str
    instruction: str
    parents: list[str]
    answers: list[Answer]
    classification: bool = False


def _round(pool: Pool, number: int, settings: Settings, caller: Caller) -> None:
    random = Random(f"{settings.seed} {number}")
    asked, parents = [], []
    for index in range(settings.round):
        shown = _sample(pool, random)
        parents.append([row["id"] for row in shown])
        prompt = prompts.new_instructions([row["instruction"] for row in shown])
        asked.append(Question(f"round {number} prompt {index}", prompt))
    tasks = []
    for question, of, answer in zip(asked, parents, caller.ask(asked), strict=True):
        if answer is None:
            break
        if answer.text is None:
            pool.dropped["refused"] += 1
            continue
        for count, instruction in enumerate(new_instructions(answer.text)):
            reason = filtered(instruction)
            if reason is None and pool.novelty.nearest(instruction, settings.novelty) is not None:
                reason = "not_novel"
            if reason is not None:
                pool.dropped[reason] += 1
                continue
            pool.novelty.add(instruction)
            tasks.append(Task(f"{question.place} task {count}", instruction, of, [answer]))
    _instances(pool, _classified(tasks, pool, random, caller), caller)


def _sample(pool: Pool, random: Random) -> list[dict[str, Any]]:
    """Six seed tasks and two made ones, in a random order; seeds in the place of made ones that are not there yet."""
    made = random.sample(pool.made, min(MADE_SHOWN, len(pool.made)))
    wanted = SEEDS_SHOWN + MADE_SHOWN - len(made)
    shown = [*random.sample(pool.seeds, min(wanted, len(pool.seeds))), *(one.row for one in made)]
    random.shuffle(shown)
    return shown


def _classified(tasks: list[Task], pool: Pool, random: Random, caller: Caller) -> list[Task]:
    """The tasks for which the model said whether they are classification."""
    known = [(row["instruction"], bool(row.get("is_classification"))) for row in pool.seeds]
    shown = [random.sample(group, min(KINDS_SHOWN // 2, len(group)))
             for kind in (True, False) if (group := [pair for pair in known if pair[1] is kind])]  # fmt: skip
    examples = [pair for group in shown for pair in group]
    random.shuffle(examples)
    asked = [Question(f"{task.place} kind", prompts.is_classification(task.instruction, examples)) for task in tasks]
    return _with_answers(tasks, caller.ask(asked), pool, lambda task, said: _set_kind(task, said))


def _set_kind(task: Task, said: str) -> None:
    task.classification = said.strip().lower().lstrip("*_ ").startswith("yes")


def _with_answers(tasks: list[Task], answers: Sequence[Answer | None], pool: Pool, use: Any) -> list[Task]:
    kept = []
    for task, answer in zip(tasks, answers, strict=True):
        if answer is None:
            break
        if answer.text is None:
            pool.dropped["refused"] += 1
            continue
        task.answers.append(answer)
        use(task, answer.text)
        kept.append(task)
    return kept


def _instances(pool: Pool, tasks: list[Task], caller: Caller) -> None:
    """Instances for the tasks; those that have some become rows."""
    asked = [Question(f"{task.place} instances", prompts.instances(task.instruction, task.classification))
             for task in tasks]  # fmt: skip
    texts: list[str] = []
    for task in _with_answers(tasks, caller.ask(asked), pool, lambda task, said: texts.append(said)):
        found = instances(texts.pop(0), task.classification)
        if not found:
            pool.dropped["no_instance"] += 1
            continue
        operator = "classification" if task.classification else "generation"
        row = {"instruction": task.instruction, "instances": found, "is_classification": task.classification}
        pool.made.append(Made.of(row, operator, task.parents, task.answers, caller.settings.model))


# --- What is taken of an answer ---


def new_instructions(text: str) -> list[str]:
    """The items of a list that goes on from a number: the first may lack its own."""
    parts = ITEM.split(text.strip())
    return [" ".join(part.split()) for part in parts if part.strip()]


def filtered(instruction: str) -> str | None:
    """Why an instruction is left out by the paper's heuristics, or None."""
    words = instruction.split()
    if not FEWEST_WORDS <= len(words) <= MOST_WORDS:
        return "too_short" if len(words) < FEWEST_WORDS else "too_long"
    if KEYWORDS.search(instruction):
        return "keyword"
    if instruction.startswith("Write a program"):  # too many of them, and it is unclear what is wanted
        return "program"
    if PUNCTUATION.match(instruction) or not instruction[0].isascii():
        return "first_character"
    return None


def instances(text: str, classification: bool) -> list[dict[str, str]]:
    """The instances of an answer that hold up: with an output that is not the input and does not break off; those
    whose input has other outputs too are left out, repeated ones are taken once."""
    pieces = FORM.split(text)
    fields = [(name.lower(), value.strip()) for name, value in zip(pieces[1::2], pieces[2::2], strict=True)]
    first, second = ("label", "input") if classification else ("input", "output")
    found = []
    for (name, value), (then, other) in itertools.pairwise(fields):
        if (name, then) == (first, second):
            given, output = (other, value) if classification else (value, other)
            found.append({"input": "" if NO_INPUT.fullmatch(given) else given, "output": output})
    outputs: dict[str, set[str]] = {}
    for one in found:
        outputs.setdefault(one["input"], set()).add(one["output"])
    kept: list[dict[str, str]] = []
    for one in found:
        whole = one["output"] and one["output"] != one["input"] and not one["output"].endswith(":")
        if whole and len(outputs[one["input"]]) == 1 and one not in kept:
            kept.append(one)
    return kept

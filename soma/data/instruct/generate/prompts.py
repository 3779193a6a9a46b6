"""What the model is asked, in our words. The steps and the operators are the papers' (see `__init__.py`)."""

from collections.abc import Sequence
from typing import Literal

# --- Self-Instruct ---

NEW_TASKS = 8


def new_instructions(examples: Sequence[str]) -> str:
    """Ask for more tasks after some that are numbered."""
    shown = "\n".join(f"{number}. {' '.join(text.split())}" for number, text in enumerate(examples, start=1))
    return (
        "Here is a numbered list of tasks that people give to a language model. Continue it with "
        f"{NEW_TASKS} more, numbered on. Each is one or two sentences, differs from all others in subject, verb and "
        "form, and can be done in writing alone: no pictures, sounds, files or actions in the world.\n\n"
        f"{shown}\n{len(examples) + 1}."
    )


def is_classification(instruction: str, examples: Sequence[tuple[str, bool]]) -> str:
    """Ask whether a task's answer is one of a few given labels."""
    shown = "\n\n".join(f"Task: {text}\nClassification: {'yes' if kind else 'no'}" for text, kind in examples)
    return (
        "Is the answer to this task one label out of a small fixed set? Say yes or no.\n\n"
        f"{shown}\n\nTask: {instruction}\nClassification:"
    )


def instances(instruction: str, classification: bool) -> str:
    """Ask for examples of a task. For classification the label comes before its input, so that the inputs are not all
    of one class (section 2.2 of the paper)."""
    if classification:
        return (
            "Name the labels that this classification task can be answered with and give an input for each of them. "
            "Write every example in this form, and nothing else:\nLabel: (a label)\nInput: (a text of that class)\n\n"
            f"Task: {instruction}"
        )
    return (
        "Give up to three examples of this task, each solved. If the task needs no text to work on, write one example "
        "with `Input: none`. Write every example in this form, and nothing else:\nInput: (what the task is done on)\n"
        f"Output: (the solution)\n\nTask: {instruction}"
    )


# --- Evol-Instruct ---

Operator = Literal["constraints", "deepen", "concretize", "reasoning", "complicate_input", "breadth"]
DEPTH: dict[Operator, str] = {
    "constraints": "Add one more constraint or requirement that an answer must satisfy.",
    "deepen": "If it asks about certain matters, ask further and wider into them.",
    "concretize": "Put more specific ideas in the place of general ones.",
    "reasoning": "If it can be solved in a few simple steps of thought, ask openly for more steps of reasoning.",
    "complicate_input": "Add data to work on in a structured form, such as a table, JSON, XML, code or a formula, and "
    "make the task depend on it.",
}
OPERATORS: tuple[Operator, ...] = (*DEPTH, "breadth")
# What an answer repeats when it takes our words for the task (the fourth condition of elimination).
GIVEN, REWRITTEN, CREATED = "#Task#", "#Harder Task#", "#New Task#"


def evolve(instruction: str, operator: Operator) -> str:
    """Ask for a harder form of a task, or for a rarer task of the same field."""
    if operator == "breadth":
        return (
            "Take the task below as inspiration for a new one. It belongs to the same field and is rarer; its length "
            "and difficulty are alike. People must be able to understand and to answer it. Write the new task alone."
            f"\n\n{GIVEN}:\n{instruction}\n\n{CREATED}:\n"
        )
    return (
        "Rewrite the task below so that AI systems find it a bit harder, while people still understand it and can "
        "answer it. Keep its data, such as tables and code, and add at most 10 to 20 words"
        f"{' beside the new data' if operator == 'complicate_input' else ''}. {DEPTH[operator]} Write the rewritten "
        f"task alone.\n\n{GIVEN}:\n{instruction}\n\n{REWRITTEN}:\n"
    )


def same_task(before: str, after: str) -> str:
    """Ask whether an evolved task gained anything (the first condition of elimination)."""
    return (
        "Do these two tasks ask for the same: with the same constraints, and the same depth and breadth of what is "
        f"asked? Answer with one word, Equal or Different.\n\nFirst task: {before}\n\nSecond task: {after}\n\nAnswer:"
    )

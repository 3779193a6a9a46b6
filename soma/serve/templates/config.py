"""The files of a folder of prompts.

    prompts/
      library.yaml            tokenizer (for budgets) and encoder (for the nearest examples); may be absent
      capital/1.yaml 2.yaml   versions of the prompt `capital`; a released one is never changed, a new one is added
      capital/tests.yaml      what every version is tested on
      capital/scores.jsonl    what tests found (`soma prompt test`)

A version:

    variables:
      country: {type: string, max_length: 80}
    messages:                                  # or `text: …` for plain completions
      - {role: system, content: Answer with the city alone.}
      - {role: user, content: "What is the capital of {{ country }}?"}
    examples:
      select: nearest                          # fixed, random (by seed), nearest (by embedding)
      by: country
      count: 2
      items:
        - {variables: {country: France}, answer: Paris}
    budget: {tokens: 256, drop: first}
    parameters: {temperature: 0, max_tokens: 8}
"""

import datetime
import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from soma.base.errors import UserError
from soma.serve.limits.config import Strict

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Scalar = Literal["string", "integer", "number", "boolean", "date"]
PYTHON: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "list": (list,),
}  # fmt: skip
SHOWN = {str: "a string", bool: "a boolean", int: "an integer", float: "a number", list: "a list", dict: "an object"}
OURS = ("model", "messages", "prompt", "prompt_variables", "input", "stream", "stream_options", "n")


class PromptError(UserError):
    """What is wrong with a prompt or its variables. `param`: the variable, for clients; `status`: of HTTP."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


class Variable(Strict):
    """What a variable may be. One without `default` must be given."""

    type: Literal["string", "integer", "number", "boolean", "date", "list"] = "string"
    items: Scalar = Field("string", description="Of a list.")
    choices: list[Any] | None = Field(None, min_length=1)
    minimum: float | None = Field(None, description="Of a number; for a list, its least length.")
    maximum: float | None = None
    max_length: int | None = Field(None, ge=1, description="Of a string, in characters.")
    default: Any = None
    description: str = ""

    @model_validator(mode="after")
    def default_fits(self) -> "Variable":
        """The default and the choices are of the type."""
        for value in [*(self.choices or ()), *([self.default] if not self.is_required else ())]:
            self.check(value)
        return self

    @property
    def is_required(self) -> bool:
        return "default" not in self.model_fields_set

    def check(self, value: Any) -> Any:
        """The value as templates see it. Raises ValueError that names the expected type and never shows the value."""
        made = scalar(self.type, value)
        if isinstance(made, list):
            made = [scalar(self.items, each) for each in made]
        size = len(made) if isinstance(made, list) else made
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"expected one of {', '.join(map(repr, self.choices))}")
        if self.minimum is not None and self.type in ("integer", "number", "list") and size < self.minimum:
            raise ValueError(f"expected {self.type} of at least {self.minimum:g}, got {size}")
        if self.maximum is not None and self.type in ("integer", "number", "list") and size > self.maximum:
            raise ValueError(f"expected {self.type} of at most {self.maximum:g}, got {size}")
        if self.max_length is not None and isinstance(made, str) and len(made) > self.max_length:
            raise ValueError(f"expected string of at most {self.max_length} characters, got {len(made)}")
        return made


def scalar(kind: str, value: Any) -> Any:
    """A value of a type, without conversions other than that of dates. Raises ValueError."""
    if kind == "date":
        if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
            return value  # YAML knows dates
        try:
            return datetime.date.fromisoformat(value)
        except (TypeError, ValueError):
            raise ValueError(f"expected date as 2026-11-26, got {shown(value)}") from None
    if not isinstance(value, PYTHON[kind]) or (isinstance(value, bool) and kind != "boolean"):
        raise ValueError(f"expected {kind}, got {shown(value)}")
    return value


def shown(value: Any) -> str:
    """The type of a value, in words."""
    return SHOWN.get(type(value), "null" if value is None else f"a {type(value).__name__}")


class TemplateMessage(Strict):
    """A turn; `content` is a Jinja template."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class Example(Strict):
    """Variables and what the model should have said."""

    variables: dict[str, Any]
    answer: str


class Examples(Strict):
    """Which examples a prompt shows, and how."""

    items: list[Example] = Field(min_length=1)
    select: Literal["fixed", "random", "nearest"] = "fixed"
    count: int | None = Field(None, ge=0, description="Left out, all.")
    seed: int = Field(0, description="Of `random`: the same seed shows the same examples.")
    by: str | None = Field(None, description="Of `nearest`: the variable that is compared.")
    form: list[TemplateMessage] | str | None = Field(
        None, description="How one is shown; left out in a chat, as the last message and the answer."
    )


class Budget(Strict):
    """The most tokens that the prompt may have. Examples are dropped until it fits."""

    tokens: int = Field(ge=1)
    drop: Literal["first", "last", "longest"] = Field(
        "first", description="Which example goes next; the first of `nearest` is the least like the question."
    )


class PromptFile(Strict):
    """One version."""

    description: str = ""
    variables: dict[str, Variable] = Field({})
    messages: list[TemplateMessage] | None = Field(None, min_length=1)
    text: str | None = None
    examples: Examples | None = None
    budget: Budget | None = None
    parameters: dict[str, Any] = Field({}, description="Of the request, where it has none of its own.")

    @field_validator("parameters")
    @classmethod
    def not_ours(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Sampling parameters alone."""
        if wrong := [name for name in OURS if name in given]:
            raise ValueError(f"{wrong[0]} belongs to the request")
        return given

    @model_validator(mode="after")
    def is_whole(self) -> "PromptFile":
        """Text or messages; examples that can be shown and compared."""
        if (self.text is None) == (self.messages is None):
            raise ValueError("expected either messages or text")
        for name in self.variables:
            if not name.isidentifier() or name in ("examples", "answer"):
                raise ValueError(f"variables.{name}: no name for a variable")
        shots = self.examples
        if shots is None:
            return self
        if (shots.select == "nearest") != (shots.by is not None):
            raise ValueError("examples: `by` names the variable that select: nearest compares")
        if shots.by is not None and (shots.by not in self.variables or self.variables[shots.by].type != "string"):
            raise ValueError(f"examples.by: {shots.by} is no variable of type string")
        if self.text is not None and not isinstance(shots.form, str):
            raise ValueError("examples.form: a text prompt needs the template of one example")
        if self.messages is not None and isinstance(shots.form, str):
            raise ValueError("examples.form: expected messages, as the prompt has")
        return self


class Expectation(Strict):
    """What a right answer is: exactly one of these."""

    exact: str | None = Field(None, description="The answer without white space around it.")
    contains: str | list[str] | None = None
    regex: str | None = Field(None, description="Found anywhere in the answer.")
    call: str | None = Field(None, description="file.py:NAME or module:NAME of (answer, variables); 0 to 1 or a bool.")

    @model_validator(mode="after")
    def one(self) -> "Expectation":
        """Exactly one, and an expression that is one."""
        if sum(each is not None for each in (self.exact, self.contains, self.regex, self.call)) != 1:
            raise ValueError("expected one of exact, contains, regex, call")
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except re.error as error:
                raise ValueError(f"regex: {error}") from None
        return self


class Case(Strict):
    """One test."""

    variables: dict[str, Any]
    expect: Expectation


class TestsFile(Strict):
    """`tests.yaml`."""

    __test__ = False  # pytest takes it for a test otherwise
    cases: list[Case] = Field(min_length=1)


class EncoderConfig(Strict):
    """An OpenAI-compatible service that makes embeddings."""

    url: str = Field(pattern="^https?://", description="Up to and with /v1.")
    model: str
    key_env: str | None = Field(None, description="The environment variable that holds its key.")


class LibraryFile(Strict):
    """`library.yaml`."""

    tokenizer: str | None = Field(None, description="Folder of the tokenizer that budgets are counted with.")
    encoder: EncoderConfig | None = None

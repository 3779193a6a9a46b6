"""One version of a prompt: variables checked, examples chosen, rendered in Jinja's sandbox, held to its budget."""

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.meta
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from soma.base.errors import UserError
from soma.serve.templates.config import PromptError, PromptFile, TemplateMessage, Variable
from soma.serve.templates.select import Embed, choose

ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
)
SHORT = 8  # hex digits of the hash in a label
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Rendered:
    """A prompt: messages or text. `examples`: places of those shown; `tokens`: counted where there is a budget."""

    label: str
    messages: Messages | None
    text: str | None
    examples: tuple[int, ...]
    tokens: int | None


Count = Callable[[Messages | str], int]


class Template:
    """A version, compiled. Raises UserError that names the file for what is wrong in it."""

    def __init__(self, name: str, version: int, file: PromptFile, where: str = "") -> None:
        self.name, self.version, self.file, self.where = name, version, file, where or f"{name}@{version}"
        content = json.dumps(file.model_dump(mode="json", exclude_defaults=True), sort_keys=True, ensure_ascii=False)
        self.hash = hashlib.sha256(content.encode()).hexdigest()
        self.lock = threading.Lock()
        self.vectors: np.ndarray | None = None  # [examples, width], made when first needed
        known = set(file.variables)
        shots = file.examples
        form = None if shots is None else shots.form
        is_text = file.text is not None
        self.turns = self._compile(file.messages, file.text, known | ({"examples"} if is_text and shots else set()))
        if shots is not None and form is None:
            assert file.messages is not None
            form = [file.messages[-1], TemplateMessage(role="assistant", content="{{ answer }}")]
        self.form = self._compile(
            form if isinstance(form, list) else None, form if isinstance(form, str) else None, known | {"answer"}
        )
        if is_text and shots and "examples" not in self._names(str(file.text)):
            raise UserError(f"{self.where}: text: it shows no {{{{ examples }}}}")
        self.shown = [
            self._variables(item.variables, f"examples.items.{place}.variables", partial=True)
            for place, item in enumerate(shots.items if shots else ())
        ]
        if shots and shots.by and (lacking := [i for i, item in enumerate(self.shown) if shots.by not in item]):
            raise UserError(f"{self.where}: examples.items.{lacking[0]}.variables.{shots.by}: is missing")

    @property
    def label(self) -> str:
        """What ledger and trace have: NAME@VERSION+HASH. The hash tells an edited file from the one that was tested."""
        return f"{self.name}@{self.version}+{self.hash[:SHORT]}"

    def _names(self, source: str) -> set[str]:
        try:
            return jinja2.meta.find_undeclared_variables(ENVIRONMENT.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{self.where}: template, line {error.lineno}: {error.message}") from None

    def _compile(
        self, messages: Sequence[TemplateMessage] | None, text: str | None, known: set[str]
    ) -> list[tuple[str, jinja2.Template]]:
        """Roles and templates; a text is one without a role."""
        given = [(each.role, each.content) for each in messages or ()] + ([("", text)] if text is not None else [])
        for _, source in given:
            if strange := self._names(source) - known - ENVIRONMENT.globals.keys():
                raise UserError(f"{self.where}: template: {sorted(strange)[0]} is no variable of this prompt")
        return [(role, ENVIRONMENT.from_string(source)) for role, source in given]

    def variables(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Checked, with defaults. Raises PromptError that names the variable and the expected type."""
        return self._variables(given, "")

    def _variables(self, given: Mapping[str, Any], path: str, *, partial: bool = False) -> dict[str, Any]:
        def wrong(name: str, words: str) -> PromptError:
            place = f"{self.where}: {path}.{name}" if path else f"prompt {self.name}@{self.version}: variable {name}"
            return PromptError(f"{place}: {words}", name)

        made: dict[str, Any] = {}
        for name, value in given.items():
            if name not in self.file.variables:
                have = ", ".join(self.file.variables) or "none"
                raise wrong(name, f"is no variable of this prompt; it has {have}")
            try:
                made[name] = self.file.variables[name].check(value)
            except ValueError as error:
                raise wrong(name, str(error)) from None
        for name, variable in self.file.variables.items():
            if name in made:
                continue
            if not variable.is_required:
                made[name] = variable.check(variable.default)
            elif not partial:
                raise wrong(name, f"is missing; expected {expected(variable)}")
        return made

    def render(
        self, given: Mapping[str, Any], *, embed: Embed | None = None, count: Count | None = None
    ) -> Rendered:  # fmt: skip
        """The prompt. embed: makes vectors, for the nearest examples; count: tokens of messages or text, for a budget.

        Raises PromptError: a variable is wrong or missing; there is no encoder or tokenizer where one is needed; not
        even without examples does it fit.
        """
        values = self.variables(given)
        places = self._choose(values, embed)
        shots = [self._example(place, values) for place in places]
        budget = self.file.budget
        if budget is None:
            return self._whole(values, places, shots, None)
        if count is None:
            raise PromptError(
                f"prompt {self.name}@{self.version}: its budget needs a tokenizer: name one (`tokenizer` in "
                "library.yaml)"
            )
        while True:
            made = self._whole(values, places, shots, None)
            tokens = count(made.messages if made.messages is not None else str(made.text))
            if tokens <= budget.tokens:
                return self._whole(values, places, shots, tokens)
            if not places:
                raise PromptError(
                    f"prompt {self.name}@{self.version}: it has {tokens} tokens without any example, its budget is "
                    f"{budget.tokens}"
                )
            gone = dropped(budget.drop, shots, count)
            places, shots = places[:gone] + places[gone + 1 :], shots[:gone] + shots[gone + 1 :]

    def _choose(self, values: Mapping[str, Any], embed: Embed | None) -> list[int]:
        shots = self.file.examples
        if shots is None:
            return []
        if shots.by is None:
            return choose(shots, None, None, None)
        if embed is None:
            raise PromptError(
                f"prompt {self.name}@{self.version}: the nearest examples need an encoder: name one (`encoder` in "
                "library.yaml)"
            )
        with self.lock:
            if self.vectors is None:
                texts = [item[shots.by] for item in self.shown]
                self.vectors = np.asarray(embed(texts), dtype=np.float64)
        return choose(shots, values[shots.by], self.vectors, embed)

    def _example(self, place: int, values: Mapping[str, Any]) -> Messages | str:
        """One example; variables that it does not have are those of the question."""
        shots = self.file.examples
        assert shots is not None
        inner = {**values, **self.shown[place], "answer": shots.items[place].answer}
        return self._filled(self.form, inner)

    def _filled(self, turns: Sequence[tuple[str, jinja2.Template]], values: Mapping[str, Any]) -> Messages | str:
        try:
            if self.file.text is not None:
                return turns[0][1].render(values)
            return [{"role": role, "content": template.render(values)} for role, template in turns]
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, OverflowError) as error:
            raise PromptError(
                f"prompt {self.name}@{self.version}: the template fails ({type(error).__name__}: {error})", status=500
            ) from error

    def _whole(
        self, values: Mapping[str, Any], places: Sequence[int], shots: Sequence[Messages | str], tokens: int | None
    ) -> Rendered:
        if self.file.text is not None:
            text = self._filled(self.turns, {**values, "examples": "".join(map(str, shots))})
            return Rendered(self.label, None, str(text), tuple(places), tokens)
        turns = self._filled(self.turns, values)
        assert isinstance(turns, list)
        between = [turn for shot in shots for turn in shot if isinstance(turn, dict)]
        return Rendered(self.label, [*turns[:-1], *between, turns[-1]], None, tuple(places), tokens)


def expected(variable: Variable) -> str:
    """A variable's type, in words."""
    return f"list of {variable.items}" if variable.type == "list" else variable.type


def dropped(order: str, shots: Sequence[Messages | str], count: Count) -> int:
    """Which example goes next."""
    if order == "longest":
        return max(range(len(shots)), key=lambda place: (count(shots[place]), place))
    return 0 if order == "first" else len(shots) - 1

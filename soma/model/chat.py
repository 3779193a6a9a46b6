"""Chat templates: Jinja2 in the sandbox, with the extras that Hugging Face templates expect. Loads no torch."""

import functools
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from soma.base.errors import UserError

Span = tuple[int, int]


class GenerationTracker(Extension):
    """`{% generation %}…{% endgeneration %}`: marks what the assistant says; its spans can be recorded."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(record_spans=self.record_spans)
        self.blocks: list[str] | None = None
        self.spans: list[Span] = []

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text = caller()
        if self.blocks is not None:
            start = sum(len(block) for block in self.blocks)
            self.spans.append((start, start + len(text)))
        return text

    @contextmanager
    def record_spans(self) -> Iterator[tuple[list[str], list[Span]]]:
        """Inside the `with`, append each rendered block to the list; the spans fill up."""
        self.blocks, self.spans = [], []
        try:
            yield self.blocks, self.spans
        finally:
            self.blocks = None


NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode keeps them for uses like this


def veil(messages: list[dict[str, Any]], names: re.Pattern[str] | None) -> tuple[list[dict[str, Any]], str]:
    """The messages with a noncharacter behind the first character of every special token's name in their strings,
    and that noncharacter: one that no message has. Nothing in the result is the name of a special token.
    """
    given = json.dumps(messages, ensure_ascii=False)
    free = next((mark for mark in NONCHARACTERS if mark not in given), None)
    if free is None:
        raise UserError("a message holds all of Unicode's noncharacters U+FDD0 to U+FDEF: that is no text")

    def walk(value: Any) -> Any:
        if isinstance(value, str) and names is not None:
            return names.sub(lambda match: match[0][0] + free + match[0][1:], value)
        if isinstance(value, list):
            return [walk(each) for each in value]
        return {key: walk(each) for key, each in value.items()} if isinstance(value, dict) else value

    return walk(messages), free


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
            sort_keys: bool = False) -> str:  # fmt: skip
    """Jinja's own tojson escapes HTML; templates expect it not to."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def plain(value: Any) -> Any:
    """Messages as plain JSON values, so that a template finds no methods to call."""
    return json.loads(json.dumps(value, ensure_ascii=False))


@functools.lru_cache(maxsize=32)
def compile_template(template: str) -> jinja2.Template:
    """A chat template, compiled. UserError with the line if it is not valid Jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTracker, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"chat template, line {error.lineno}: {error.message}") from None


@functools.lru_cache(maxsize=16)
def has_generation_marks(template: str) -> bool:
    """Whether the template says with `{% generation %}` what the assistant wrote."""
    blocks = compile_template(template).environment.parse(template).find_all(jinja2.nodes.CallBlock)
    return any(isinstance(block.call.node, jinja2.nodes.ExtensionAttribute) for block in blocks)


def render(template: str, messages: list[dict[str, Any]], **variables: Any) -> tuple[str, list[Span]]:
    """The text, and the spans of `{% generation %}` blocks in it.

    Raises UserError with the template's own words if it refuses the messages.
    """
    compiled = compile_template(template)
    try:
        with compiled.environment.record_spans() as (blocks, spans):  # type: ignore[attr-defined]
            for block in compiled.generate(messages=plain(messages), **variables):
                blocks.append(block)
            return "".join(blocks), list(spans)
    except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"the chat template refuses these messages: {error}") from None


def answer_spans(
    template: str, messages: list[dict[str, Any]], special_tokens: set[str], **variables: Any
) -> tuple[str, list[Span]]:
    """The conversation's text and the character spans that the assistant wrote, end-of-turn tokens included.

    Templates with `{% generation %}` say so themselves. For others, the answer to messages[:i] is what message i adds
    to the prompt that ends in the generation prompt; white space after its last special token is not the answer's.
    Where a template changes earlier text when a message is added (it drops the reasoning of old answers, say), the
    answer is where another content in its place changes the text, with the special token behind it. Messages of weight
    0 (as in OpenAI's files) have no span. Raises UserError where none of this gives an exact span.
    """
    text, spans = render(template, messages, add_generation_prompt=False, **variables)
    answers = [index for index, message in enumerate(messages) if message.get("role") == "assistant"]
    learned = [index for index in answers if messages[index].get("weight") != 0]
    if has_generation_marks(template):
        if learned == answers:
            return text, spans
        if len(spans) != len(answers):
            raise UserError(
                f"the chat template marks {len(spans)} answers of {len(answers)}: it cannot be told which has weight 0"
            )
        return text, [span for index, span in zip(answers, spans, strict=True) if index in learned]
    spans = []
    for index in learned:
        span = _added(template, messages, index, text, special_tokens, variables)
        span = span or _replaced(template, messages, index, text, special_tokens, variables)
        if span is None:
            raise UserError(
                f"the chat template renders message {index} differently once more messages follow, so the answer's "
                "tokens cannot be told apart; mark them with {% generation %} in the template"
            )
        spans.append(span)
    return text, spans


def _added(
    template: str, messages: list[dict[str, Any]], index: int, text: str, special_tokens: set[str],
    variables: dict[str, Any],
) -> Span | None:  # fmt: skip
    """What message `index` adds to the generation prompt of those before it, if `text` begins so."""
    try:
        prompt, _ = render(template, messages[:index], add_generation_prompt=True, **variables)
        after, _ = render(template, messages[: index + 1], add_generation_prompt=False, **variables)
    except UserError:  # no conversation of its own, such as one that begins with an answer
        return None
    if not after.startswith(prompt) or not text.startswith(after):
        return None
    return len(prompt), end_of_turn(after, len(prompt), special_tokens)


def _replaced(
    template: str, messages: list[dict[str, Any]], index: int, text: str, special_tokens: set[str],
    variables: dict[str, Any],
) -> Span | None:  # fmt: skip
    """Where the content of message `index` stands in `text`, with the special token behind it; None where it has tool
    calls, where another content changes more than one place, or where no special token follows."""
    message = messages[index]
    if message.get("tool_calls") or not isinstance(message.get("content"), str):
        return None
    given = json.dumps(messages, ensure_ascii=False)
    mark = next(name for number in range(len(given) + 1) if (name := f"answer{number}here") not in given)
    other = [*messages[:index], message | {"content": mark}, *messages[index + 1 :]]
    try:
        shown, _ = render(template, other, add_generation_prompt=False, **variables)
    except UserError:
        return None
    if shown.count(mark) != 1:
        return None
    before, after = shown.split(mark)
    end = len(text) - len(after)
    if not (text.startswith(before) and text.endswith(after) and len(before) < end):
        return None
    start = len(before)
    gap = len(after) - len(after.lstrip())
    follows = max((token for token in special_tokens if token and after.startswith(token, gap)), key=len, default=None)
    return None if follows is None else (start, end + gap + len(follows))


def end_of_turn(text: str, start: int, special_tokens: set[str]) -> int:
    """Where an answer that starts at `start` and runs to the end of `text` ends: white space that follows its last
    special token belongs to the template."""
    stripped = text.rstrip()
    ends_special = any(stripped.endswith(token) for token in special_tokens)
    return len(stripped) if ends_special and len(stripped) > start else len(text)

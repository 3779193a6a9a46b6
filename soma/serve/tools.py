"""What a request says about tools: which there are, and what grammar an answer that must be calls has."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from soma.engine.guided import WHITE_SPACE, Guided
from soma.model.tokenizer import Tokenizer
from soma.serve.errors import ApiError
from soma.serve.tool_parser import HERMES, LLAMA, MISTRAL, ToolFormat, ToolParser, decode

MOST_CALLS = 16  # that a grammar lets an answer make


class Function(BaseModel):
    """A function that the model may call. `parameters` is a JSON schema."""

    model_config = ConfigDict(strict=True)
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """An entry of `tools`."""

    model_config = ConfigDict(strict=True)
    type: Literal["function"]
    function: Function


def format_of(template: str) -> ToolFormat:
    """The form of calls that a chat template teaches. Raises ApiError where it is none of the known ones."""
    if "[TOOL_CALLS]" in template and "[ARGS]" not in template:
        return MISTRAL
    if "<tool_call>" in template and "<function=" not in template:
        return HERMES
    if '"parameters"' in template and ("<|python_tag|>" in template or "<|start_header_id|>" in template):
        return LLAMA
    raise ApiError(400, "the chat template of this model shows no form of tool calls that this server can read "
                   "(Hermes, Mistral, Llama 3)", "tools", "tools_not_supported")  # fmt: skip


@dataclass(frozen=True)
class ToolUse:
    """What one request says about tools: those that the template is shown, and what the answer has to do with them."""

    form: ToolFormat
    tools: tuple[Tool, ...]
    guided: Guided | None  # the grammar of an answer that must be calls
    marks: Mapping[int, str]  # special tokens that stand for a mark: they have no text of their own

    @property
    def for_template(self) -> list[dict[str, Any]]:
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def parser(self) -> "ToolParser":
        return ToolParser(self.form, {tool.function.name for tool in self.tools}, self.marks)


def read_tools(
    tools: Sequence[Tool] | None, choice: str | dict[str, Any] | None, parallel: bool, tokenizer: Tokenizer
) -> ToolUse | None:
    """What a request's `tools`, `tool_choice` and `parallel_tool_calls` mean; None: no call can come.

    Raises ApiError: tool_choice without such a tool, a template without tool calls.
    """
    name = _chosen(choice)
    known = {tool.function.name: tool for tool in tools or ()}
    if not known and choice not in (None, "none", "auto"):
        raise ApiError(400, "tool_choice is only allowed together with tools", "tool_choice")
    if name is not None and name not in known:
        raise ApiError(400, f"tool_choice names {name!r}, which is not among the tools", "tool_choice")
    if len(known) < len(tools or ()):
        raise ApiError(400, "tools: two of them have the same name", "tools")
    if not known or choice == "none":
        return None
    form = format_of(tokenizer.chat_template(tools=True))
    added = tokenizer.inner.get_added_tokens_decoder()
    ours = (form.mark, form.close)
    marks = {id: token.content for id, token in added.items() if token.special and token.content in ours}
    callable_ = list(known.values()) if name is None else [known[name]]
    guided = None
    if name is not None or choice == "required":
        most = 1 if name is not None or not parallel else MOST_CALLS
        guided = Guided.grammar(grammar(form, callable_, most, marks)).named("tools")
    return ToolUse(form, tuple(known.values()), guided, marks)


def calls_for_template(calls: Any, where: str) -> list[dict[str, Any]]:
    """Earlier calls as templates expect them: arguments as an object, not as its JSON text. Raises ApiError."""
    if not isinstance(calls, list):
        raise ApiError(400, f"{where} must be a list", where)
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(400, f"{where}: a call needs a function with a name", where)
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = (decode(arguments.strip(), 0) or (None, 0))[0]
        if not isinstance(arguments, dict):
            raise ApiError(400, f"{where}: the arguments of {function['name']} are no JSON object", where)
        found.append({**call, "function": {**function, "arguments": arguments}})
    return found


def _chosen(choice: str | dict[str, Any] | None) -> str | None:
    """The function that tool_choice names, if it does."""
    match choice:
        case None | "none" | "auto" | "required":
            return None
        case {"type": "function", "function": {"name": str(name)}}:
            return name
    raise ApiError(400, "tool_choice must be none, auto, required, or name a function", "tool_choice")


def grammar(form: ToolFormat, tools: Sequence[Tool], most: int, marks: Mapping[int, str]) -> str:
    """The Lark grammar of one to `most` calls. Each tool's parameters are a JSON grammar of their own, so that
    references within a schema hold."""
    more = f" ({literal(form.between, marks)} call){{0,{most - 1}}}" if most > 1 else ""
    lines = [
        f"start: {literal(form.first, marks)} call{more} {literal(form.last, marks)}".rstrip(),
        f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}",
    ]
    for i, tool in enumerate(tools):
        begin = f'{{"name": "{tool.function.name}", "{form.key}": '
        schema = {"type": "object", **(tool.function.parameters or {}),
                  "x-guidance": {"whitespace_pattern": WHITE_SPACE}}  # fmt: skip
        lines.append(f'call_{i}: {literal(begin, {})} arguments_{i} "}}"')
        lines.append(f"arguments_{i}: %json {json.dumps(schema, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def literal(text: str, marks: Mapping[int, str]) -> str:
    """A text in Lark, where marks that are special tokens are these tokens."""
    names = {content: f"<[{id}]>" for id, content in marks.items()}
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
    return " ".join(names.get(part) or json.dumps(part, ensure_ascii=False) for part in parts if part)

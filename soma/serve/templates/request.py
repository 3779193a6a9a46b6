"""Requests that name a prompt of the service instead of bringing one.

    {"model": "m", "prompt": "capital@2", "prompt_variables": {"country": "Chile"}}
    {"model": "m", "prompt": {"id": "capital", "version": "2", "variables": {"country": "Chile"}}}   (as OpenAI's)
    X-Soma-Prompt: capital@2       X-Soma-Prompt-Variables: {"country": "Chile"}

Of /v1/completions a `prompt` that is a text is the prompt itself, unless `prompt_variables` come with it.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

from starlette.requests import Request

from soma.serve.errors import ApiError
from soma.serve.templates.config import PromptError
from soma.serve.templates.library import Library
from soma.serve.templates.template import Rendered

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
NAME_HEADER, VARIABLES_HEADER = "x-soma-prompt", "x-soma-prompt-variables"
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")  # one of them says how long an answer may be


def reference(request: Request, value: dict[str, Any]) -> tuple[str, Any] | None:
    """The prompt that a request names and its variables, both taken out of `value`; None if it names none. Raises
    ApiError."""
    path, given = request.scope["path"], value.get("prompt")
    named = request.headers.get(NAME_HEADER)
    is_name = isinstance(given, str) and (path != TEXT or "prompt_variables" in value)
    if not (isinstance(given, dict) or is_name or named is not None):
        return None
    if named is not None and "prompt" in value:
        raise ApiError(400, f"the prompt is named twice, in {NAME_HEADER} and in the body", "prompt")
    if named is not None:
        try:
            return named, json.loads(request.headers.get(VARIABLES_HEADER) or "{}")
        except ValueError:
            raise ApiError(400, f"{VARIABLES_HEADER}: expected a JSON object", "prompt_variables") from None
    del value["prompt"]
    if not isinstance(given, dict):
        return str(given), value.pop("prompt_variables", {})
    if strange := given.keys() - {"id", "version", "variables"}:
        raise ApiError(400, f"prompt: it has no {sorted(strange)[0]}; expected id, version, variables", "prompt")
    version = given.get("version")
    name = f"{given.get('id')}" + (f"@{version}" if version is not None else "")
    return name, given.get("variables") or {}


async def fill(request: Request, value: dict[str, Any]) -> bool:
    """Put the prompt that a request names in its place; whether it named one. The version goes into
    `request.state.tags`, from where `called` takes it to ledger and trace. Raises ApiError."""
    if request.scope["path"] not in (CHAT, TEXT, RESPONSES):
        return False
    found = reference(request, value)
    if found is None:
        return False
    library: Library | None = getattr(request.app.state.service, "prompts", None)
    if library is None:
        raise ApiError(400, "this service has no prompts", "prompt", "no_prompts")
    name, variables = found
    if not isinstance(variables, dict):
        raise ApiError(400, "prompt_variables: expected an object", "prompt_variables")
    try:
        template, made = await asyncio.to_thread(library.render, name, variables)
    except PromptError as error:
        param = "prompt" if error.param is None else f"prompt_variables.{error.param}"
        codes = {404: "prompt_not_found", 409: "prompt_changed"}
        raise ApiError(error.status, str(error), param, codes.get(error.status, "invalid_prompt"),
                       retry_after=5 if error.status == 503 else None) from error  # fmt: skip
    place(request.scope["path"], value, made)
    for parameter, default in template.file.parameters.items():
        if parameter in LENGTHS:
            if all(value.get(other) is None for other in LENGTHS):
                value["max_output_tokens" if request.scope["path"] == RESPONSES else parameter] = default
        else:
            value.setdefault(parameter, default)
    request.state.tags = {"prompt": made.label}
    return True


def place(path: str, value: dict[str, Any], made: Rendered) -> None:
    """Put a rendered prompt where a route expects it; a chat goes on with the messages of the request. Raises
    ApiError."""
    if path == TEXT:
        if made.text is None:
            raise ApiError(400, f"{made.label} is a conversation: use {CHAT}", "prompt", "invalid_prompt")
        value["prompt"] = made.text
        return
    turns: list[Any] = made.messages if made.messages is not None else [{"role": "user", "content": made.text}]
    field = "messages" if path == CHAT else "input"
    more = value.get(field) or []
    if field == "input" and isinstance(more, str):
        more = [{"role": "user", "content": more}]
    if not isinstance(more, list):
        raise ApiError(400, f"{field}: expected a list", field)
    value[field] = [*turns, *more]


def load(folder: str | Path | None, tokenizer: Any = None) -> Library | None:
    """The prompts of a service; None if it has no folder of them. tokenizer: the served model's, for budgets. Raises
    UserError."""
    return None if folder is None else Library(Path(folder), tokenizer=tokenizer)

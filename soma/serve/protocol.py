"""What clients may send: OpenAI's chat and completion requests, and what of them is refused by name."""

import asyncio
import json
import re
import reprlib
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from soma.engine.params import SamplingParams
from soma.serve.errors import ApiError
from soma.serve.retrieval.form import Search
from soma.serve.structured import guided_of
from soma.serve.templates import request as prompts
from soma.serve.tools import Tool, calls_for_template

BODY_SECONDS = 60.0  # in which a body must have come
MAX_CHOICES = 128
MAX_PRIORITY = 100  # a waiting request gains one in ten seconds: what is bound so far does not wait for ever
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
NESTED = ("messages", "role", "content", "stream_options", "include_usage")  # fields with a path of more than one name
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

# Fields that change nothing about the answer here: taken and left alone.
IGNORED = {
    "store", "metadata", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "reasoning_effort", "verbosity",
}  # fmt: skip
# Fields that OpenAI has and that would change the answer: refused by name unless they say what we do anyway.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (), "prediction": (),
    "web_search_options": (), "moderation": (), "suffix": ("",),
}  # fmt: skip


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class Sampling(BaseModel):
    """What both routes take. The second block is ours and vLLM's, sent through the client's `extra_body`."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    model: str
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str | list[int]] | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    ignore_eos: bool | None = None

    user: str | None = Field(None, max_length=512)  # users share the engine evenly
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)  # as vLLM's: lower runs first
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False)  # seconds

    @property
    def scheduling(self) -> dict[str, Any]:
        """Options of `Engine.submit_all`: when the request runs, and how long it may take."""
        return {"priority": self.priority or 0, "key": self.user or "", "timeout": self.timeout}

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, **more: Any) -> SamplingParams:
        """As the engine takes it; raises RequestError that names the field."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed together with stream=true", "stream_options")
        names = (
            "temperature", "top_p", "max_tokens", "seed", "presence_penalty", "frequency_penalty", "top_k", "min_p",
            "repetition_penalty", "ignore_eos",
        )  # fmt: skip
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        values["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        values["stop_token_ids"] = tuple(self.stop_token_ids or ())
        values["bad_words"] = tuple(
            word if isinstance(word, str) else tuple(word) for word in self.bad_words or ()
        )  # fmt: skip
        values["logit_bias"] = _biases(self.logit_bias or {})
        values["guided"] = guided_of(dict(self))
        values |= more
        return SamplingParams(**{name: value for name, value in values.items() if value is not None})


def _biases(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise ApiError(400, "logit_bias must map token ids to numbers", "logit_bias") from None


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = None

    def for_template(self, place: int) -> dict[str, Any]:
        """What the chat template gets: role, content as text, and what tools need."""
        where = f"messages.{place}"
        if self.role not in ("system", "developer", "user", "assistant", "tool", "function"):
            raise ApiError(400, f"{where}.role: {self.role!r} is not a role", f"{where}.role")
        content = self.content
        if isinstance(content, list):
            for part in content:
                if part.get("type") != "text" or not isinstance(part.get("text"), str):
                    kind = part.get("type")
                    raise ApiError(400, f"{where}.content: parts of type {kind!r} are not supported, only text",
                                   f"{where}.content")  # fmt: skip
            content = "".join(part["text"] for part in content)
        extra = self.model_extra or {}
        kept = {key: extra[key] for key in ("name", "tool_calls", "tool_call_id") if extra.get(key) is not None}
        if "tool_calls" in kept:
            kept["tool_calls"] = calls_for_template(kept["tool_calls"], f"{where}.tool_calls")
        if content is None and not kept:
            raise ApiError(400, f"{where}.content is missing", f"{where}.content")
        return {"role": self.role, "content": content or "", **kept}


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    retrieval: bool | Search | None = None  # ours: answer from the service's index

    def params(self) -> SamplingParams:
        """As the engine takes it."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs is only allowed together with logprobs=true", "top_logprobs")
        more: dict[str, Any] = {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}
        if self.max_completion_tokens is not None:
            more["max_tokens"] = self.max_completion_tokens
        return self.sampling(**more)


class CompletionRequest(Sampling):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None

    def params(self) -> SamplingParams:
        """As the engine takes it."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, "best_of is not supported other than equal to n", "best_of")
        more: dict[str, Any] = {"logprobs": self.logprobs, "prompt_logprobs": self.logprobs if self.echo else None}
        if self.max_tokens is None:
            more["max_tokens"] = DEFAULT_COMPLETION_TOKENS
        return self.sampling(**more)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt, whatever form it came in."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise ApiError(400, "prompt is an empty list", "prompt")
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


Body = TypeVar("Body", bound=Sampling)


async def read_body(request: Request, kind: type[Body], limit: int) -> Body:
    """The request's JSON as `kind`. Raises ApiError: wrong content type, too large (413), malformed, wrong fields."""
    value, _ = await read_json(request, limit)
    await prompts.fill(request, value)
    return parse(value, kind)


async def read_json(request: Request, limit: int) -> tuple[dict[str, Any], bytes]:
    """The JSON object of a request, and the bytes that it came in. Raises ApiError as `read_body`."""
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(400, f"the content type is {content_type or 'missing'}; it must be application/json",
                       code="unsupported_content_type")  # fmt: skip
    too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > limit:
                    raise too_large
    except TimeoutError:
        raise too_slow() from None
    except ClientDisconnect:
        raise ApiError(400, "the body ended early") from None
    try:
        value = json.loads(data, parse_constant=_no_constant)
        if SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds half a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value, bytes(data)


def too_slow() -> ApiError:
    """For a body that does not come to its end."""
    return ApiError(408, f"the body was not here after {BODY_SECONDS:g} seconds", code="body_too_slow")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def parse(value: dict[str, Any], kind: type[Body]) -> Body:
    """Validate a request, naming the field that is wrong."""
    for name, harmless in UNSUPPORTED.items():
        given = value.pop(name, None)
        if given is not None and given not in harmless:
            raise ApiError(400, f"{name} is not supported by this server", name, "unsupported_parameter")
    value = {name: given for name, given in value.items() if name not in IGNORED}
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> ApiError:
    """The first mistake that pydantic found, in OpenAI's words where it has some."""
    first = error.errors(include_url=False, include_context=False)[0]
    top = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {top}", top, "unknown_parameter")
    if first["type"] == "missing":
        name = ".".join(str(part) for part in first["loc"])
        return ApiError(400, f"you must provide {name}", name, "missing_required_parameter")
    # A union's branches are in the location too; a client knows only the names and places.
    path = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in NESTED)
    path = path if top in ("messages", "stream_options") else top
    given = reprlib.repr(first.get("input"))
    return ApiError(400, f"{path}: {first['msg'].lower()}, got {given}", path, "invalid_value")

"""/tokenize and /detokenize, in the shapes of vLLM."""

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field

from soma.serve import protocol
from soma.serve.calls import check_allowed
from soma.serve.errors import ApiError
from soma.serve.protocol import Message

if TYPE_CHECKING:
    from soma.serve.service import Service

Body = TypeVar("Body", bound=BaseModel)


class TokenizeRequest(BaseModel):
    """Body of POST /tokenize: `prompt`, or `messages` for the chat template."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None  # left out: yes for a prompt, no for messages (the template has them)
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(BaseModel):
    """Body of POST /detokenize."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())
    model: str | None = None
    tokens: list[int]


async def read_as(request: Request, kind: type[Body], limit: int) -> Body:
    """The request's JSON as `kind`, refused as `protocol.read_body` does."""
    read: Any = protocol.read_body
    body: Body = await read(request, kind, limit)
    return body


def encode(service: "Service", body: TokenizeRequest) -> list[int]:
    """Ids of the prompt or the conversation. Raises ApiError."""
    tokenizer = service.tokenizer
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", "prompt")
    if body.messages is None:
        special = body.add_special_tokens is not False
        return tokenizer.inner.encode(body.prompt or "", add_special_tokens=special).ids
    if not tokenizer.has_chat_template:
        raise ApiError(400, f"the model `{service.model_name}` has no chat template; give prompt", "messages",
                       "no_chat_template")  # fmt: skip
    messages = [message.for_template(place) for place, message in enumerate(body.messages)]
    text = tokenizer.render_chat(messages, body.add_generation_prompt)
    return tokenizer.inner.encode(text, add_special_tokens=body.add_special_tokens is True).ids


def install(app: FastAPI, service: "Service") -> None:
    """Add the routes. They need no engine and answer while it restarts."""

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await read_as(request, TokenizeRequest, service.max_body_bytes)
        service.check_model(body.model or service.model_name)
        check_allowed(request, body.model or service.model_name)
        ids = await asyncio.to_thread(encode, service, body)
        strings = [service.tokenizer.token_text(id) for id in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": service.engine.max_length, "tokens": ids, "token_strs": strings}

    @app.post("/detokenize")
    async def detokenize(request: Request) -> dict[str, Any]:
        body = await read_as(request, DetokenizeRequest, service.max_body_bytes)
        service.check_model(body.model or service.model_name)
        check_allowed(request, body.model or service.model_name)
        last = service.tokenizer.vocab_size - 1
        for token in body.tokens:
            if not 0 <= token <= last:
                raise ApiError(400, f"tokens: id {token} is outside the vocabulary (0 to {last})", "tokens")
        return {"prompt": await asyncio.to_thread(service.tokenizer.decode, body.tokens, False)}

"""OpenAI's routes that make text: /v1/chat/completions, /v1/completions, /v1/responses."""

import asyncio

from fastapi import FastAPI, Request
from fastapi.responses import Response

from soma.engine.prompts import encode_prompt
from soma.model.tokenizer import Tokenizer
from soma.serve.answer import answer
from soma.serve.errors import ApiError
from soma.serve.formats import ChatFormat, CompletionFormat
from soma.serve.protocol import ChatRequest, CompletionRequest, read_body
from soma.serve.response_request import ResponsesRequest
from soma.serve.responses import ResponsesFormat
from soma.serve.retrieval import routes as retrieval
from soma.serve.service import Service
from soma.serve.tool_calls import ToolChatFormat, with_calls
from soma.serve.tools import read_tools


def install(app: FastAPI, service: Service, knowledge: retrieval.Knowledge | None) -> None:
    """The routes. knowledge: the index that chats are answered from."""

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await chat(service, request, knowledge)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await complete(service, request)

    @app.post("/v1/responses")
    async def make_response(request: Request) -> Response:
        return await respond(service, request)


async def chat(service: Service, request: Request, knowledge: retrieval.Knowledge | None) -> Response:
    """Answer a conversation, with tools or with passages of the index. Raises ApiError."""
    service.check_open()
    body = await read_body(request, ChatRequest, service.max_body_bytes)
    adapter = service.check_model(body.model)
    params = body.params()
    check_chat_template(service, "messages")
    messages = [message.for_template(place) for place, message in enumerate(body.messages)]
    parallel = body.parallel_tool_calls is not False
    use = await asyncio.to_thread(read_tools, body.tools, body.tool_choice, parallel, service.tokenizer)
    params = with_calls(params, use)
    shown = None if use is None else use.for_template
    passages = await retrieval.with_passages(knowledge, body.retrieval, messages, tools=use is not None)
    prompt = await asyncio.to_thread(service.tokenizer.encode_chat, messages, True, shown)
    known = params.logprobs is not None
    shape: ChatFormat
    if passages is not None and knowledge is not None:
        shape = retrieval.CitedFormat(service.names, body.model, knowledge, passages, logprobs=known)
    elif use is None:
        shape = ChatFormat(service.names, body.model, logprobs=known)
    else:
        shape = ToolChatFormat(service.names, body.model, use, logprobs=known)
    return await answer(service, request, body, [prompt], params, shape, adapter)


async def complete(service: Service, request: Request) -> Response:
    """Go on with one text or several. Raises ApiError."""
    service.check_open()
    body = await read_body(request, CompletionRequest, service.max_body_bytes)
    adapter = service.check_model(body.model)
    params = body.params()
    prompts = await asyncio.to_thread(encode_all, service.tokenizer, body.prompts)
    shape = CompletionFormat(service.names, body.model, logprobs=params.logprobs is not None)
    if body.echo:
        n = body.n or 1
        for index in range(len(prompts) * n):
            given = body.prompts[index // n]
            text = given if isinstance(given, str) else service.tokenizer.decode(given)
            shape.echo(index, text)
    return await answer(service, request, body, prompts, params, shape, adapter)


async def respond(service: Service, request: Request) -> Response:
    """Answer a conversation in the newer shape. Raises ApiError."""
    service.check_open()
    body = await read_body(request, ResponsesRequest, service.max_body_bytes)
    adapter = service.check_model(body.model)
    params = body.params()
    check_chat_template(service, "input")
    parallel = body.parallel_tool_calls is not False
    use = await asyncio.to_thread(read_tools, body.functions, body.chosen, parallel, service.tokenizer)
    params = with_calls(params, use)
    shown = None if use is None else use.for_template
    prompt = await asyncio.to_thread(service.tokenizer.encode_chat, body.messages, True, shown)
    shape = ResponsesFormat(service.names, body.model, body, use)
    return await answer(service, request, body, [prompt], params, shape, adapter)


def check_chat_template(service: Service, field: str) -> None:
    """Raises ApiError for a model that no conversation can be put to; `field` of the body held it."""
    if not service.tokenizer.has_chat_template:
        raise ApiError(400, f"the model `{service.model_name}` has no chat template; use /v1/completions", field,
                       "no_chat_template")  # fmt: skip


def encode_all(tokenizer: Tokenizer, prompts: list[str] | list[list[int]]) -> list[list[int]]:
    """Ids of every prompt; those given as ids stay as they are."""
    return [encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]

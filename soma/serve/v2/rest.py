"""The Open Inference Protocol V2 over HTTP, with binary tensors and Triton's generate, repository and statistics.

Errors are `{"error": "…"}`. Source: open-inference-protocol, specification/protocol/inference_rest.md; Triton's
docs/protocol/extension_{binary_data,generate,model_repository,statistics,classification}.md.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import orjson
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from soma.serve import protocol
from soma.serve.calls import caller_of
from soma.serve.disconnect import CLIENT_CLOSED_REQUEST, unless_disconnected
from soma.serve.errors import ApiError, as_api_error, error_response
from soma.serve.v2 import datatypes
from soma.serve.v2.front import Front, InferRequest, Output, Running, present
from soma.serve.v2.model import Origin, TensorSpec, V2Model

HEADER_LENGTH = "Inference-Header-Content-Length"
WINDOWS = {"gzip": 31, "deflate": 15}  # zlib's names of the formats


def install(app: FastAPI, front: Front) -> None:
    """Add the routes."""

    @app.get("/v2")
    async def server() -> dict[str, Any]:
        return front.metadata()

    @app.get("/v2/health/live")
    async def live() -> Response:
        return Response()

    @app.get("/v2/health/ready")
    async def ready() -> Response:
        return Response(status_code=200 if front.ready else 503)

    @app.get("/v2/models/stats")
    async def all_statistics(request: Request) -> dict[str, Any]:
        return {"model_stats": front.statistics(caller=caller_of(request))}

    @app.get("/v2/models/{name}")
    @app.get("/v2/models/{name}/versions/{version}")
    async def metadata(request: Request, name: str, version: str = "") -> dict[str, Any]:
        return await front.model_metadata(name, version, caller_of(request))

    @app.get("/v2/models/{name}/ready")
    @app.get("/v2/models/{name}/versions/{version}/ready")
    async def model_ready(request: Request, name: str, version: str = "") -> Response:
        return Response(status_code=200 if front.is_ready(name, version, caller_of(request)) else 503)

    @app.get("/v2/models/{name}/stats")
    @app.get("/v2/models/{name}/versions/{version}/stats")
    async def statistics(request: Request, name: str, version: str = "") -> dict[str, Any]:
        return {"model_stats": front.statistics(name, version, caller_of(request))}

    # The most frequent route: FastAPI's own reading of path parameters takes a sixth of such a request's time.
    @app.post("/v2/models/{name}/infer", openapi_extra=path_parameters("name"))
    @app.post("/v2/models/{name}/versions/{version}/infer", openapi_extra=path_parameters("name", "version"))
    async def infer(request: Request) -> Response:
        name, version = request.path_params["name"], request.path_params.get("version", "")
        body = await read_bytes(request, front.max_body_bytes)
        asked, is_raw = read_infer(front, name, version, body, request.headers.get(HEADER_LENGTH))
        running = await front.start(asked, origin_of(request))
        async with running:
            outputs = await unless_disconnected(request, running.only())
        if outputs is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        made = infer_response(running, outputs, everything_binary=is_raw)
        return compressed(request, made)

    @app.post("/v2/models/{name}/generate")
    @app.post("/v2/models/{name}/versions/{version}/generate")
    async def generate(request: Request, name: str, version: str = "") -> Response:
        asked = await read_generate(front, request, name, version)
        running = await front.start(asked, origin_of(request))
        async with running:
            outputs = await unless_disconnected(request, running.only())
        if outputs is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        data = dump(generated(running, outputs))
        return Response(data, media_type="application/json", headers=running.passage.headers)

    @app.post("/v2/models/{name}/generate_stream")
    @app.post("/v2/models/{name}/versions/{version}/generate_stream")
    async def generate_stream(request: Request, name: str, version: str = "") -> Response:
        asked = await read_generate(front, request, name, version)
        specs = {spec.name: spec for spec in present(front.repository.get(name, version)).inputs}
        if "stream" in specs and "stream" not in asked.inputs:  # who asks here wants it as it comes
            asked.inputs["stream"], asked.datatypes["stream"] = np.ones(1, bool), "BOOL"
        return V2Stream(await front.start(asked, origin_of(request), stream=True))

    @app.post("/v2/repository/index")
    async def index(request: Request) -> JSONResponse:
        body = await read_json(request, front.max_body_bytes, optional=True)
        return JSONResponse(front.index(only_ready=body.get("ready") is True, caller=caller_of(request)))

    @app.post("/v2/repository/models/{name}/load")
    async def load(request: Request, name: str) -> Response:
        front.check_control()
        body = await read_json(request, front.max_body_bytes, optional=True)
        await front.load(name, parameters_of(body, "load"))
        return Response()

    @app.post("/v2/repository/models/{name}/unload")
    async def unload(request: Request, name: str) -> Response:
        front.check_control()
        await read_json(request, front.max_body_bytes, optional=True)  # `unload_dependents`: there are none
        await front.unload(name)
        return Response()


def path_parameters(*names: str) -> dict[str, Any]:
    """What the OpenAPI document says of a route that reads its path itself."""
    return {
        "parameters": [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    }


def origin_of(request: Request) -> Origin:
    """Who asks, as the authentication before has found out."""
    address = getattr(request.state, "address", None) or (request.client.host if request.client else "")
    return Origin(request.url.path, address, caller_of(request))


async def read_bytes(request: Request, limit: int) -> bytes:
    """The body, unpacked. Raises ApiError: too large (413, packed or not), an encoding that is not known."""
    too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", *WINDOWS):
        raise ApiError(415, f"the content encoding {encoding!r} is not known; gzip and deflate are")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise too_large
    unpack = zlib.decompressobj(WINDOWS[encoding]) if encoding in WINDOWS else None
    data = bytearray()
    try:
        async with asyncio.timeout(protocol.BODY_SECONDS):
            async for part in request.stream():
                data += unpack.decompress(part, limit + 1 - len(data)) if unpack and part else part
                if len(data) > limit:
                    raise too_large
    except TimeoutError:
        raise protocol.too_slow() from None
    except ClientDisconnect:
        raise ApiError(400, "the body ended early") from None
    except zlib.error:
        raise ApiError(400, f"the body is no {encoding}") from None
    if unpack and data and not unpack.eof:
        raise ApiError(400, f"the body is no whole {encoding}")
    return bytes(data)


def parse_json(data: bytes | memoryview) -> dict[str, Any]:
    """A JSON object. Raises ApiError."""
    try:
        value = orjson.loads(data)
    except ValueError:
        raise ApiError(400, "failed to parse the request JSON") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the request JSON must be an object")
    return value


async def read_json(request: Request, limit: int, *, optional: bool = False) -> dict[str, Any]:
    """The body as a JSON object; `optional`: none is an empty one."""
    data = await read_bytes(request, limit)
    return {} if optional and not data.strip() else parse_json(data)


def parameters_of(holder: dict[str, Any], where: str) -> dict[str, Any]:
    """The `parameters` of a request, an input or an output. Raises ApiError."""
    given = holder.get("parameters")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise ApiError(400, f"{where}: parameters must be an object")
    return given


def read_infer(
    front: Front, name: str, version: str, body: bytes, header: str | None
) -> tuple[InferRequest, bool]:  # fmt: skip
    """The request in a body, and whether it was nothing but a tensor's bytes. Raises ApiError."""
    if header is None:
        return parse_infer(name, version, parse_json(body), memoryview(b"")), False
    if not (header.isascii() and header.isdigit()) or int(header) > len(body):
        raise ApiError(400, f"{HEADER_LENGTH} is {header}; the body has {len(body)} bytes")
    if int(header) == 0:
        return raw_request(name, version, present(front.repository.get(name, version)), body), True
    whole = memoryview(body)
    return parse_infer(name, version, parse_json(whole[: int(header)]), whole[int(header) :]), False


def parse_infer(name: str, version: str, value: dict[str, Any], binary: memoryview) -> InferRequest:
    """The request in its JSON and the tensors behind it. Raises ApiError."""
    identity = value.get("id", "")
    if not isinstance(identity, str):
        raise ApiError(400, "id must be a string")
    made = InferRequest(name, version, identity, parameters_of(value, "the request"))
    for tensor in objects(value, "inputs", needed=True):
        where = f"input '{tensor['name']}'"
        if tensor["name"] in made.inputs:
            raise ApiError(400, f"{where} is there twice")
        kind = datatypes.known(tensor.get("datatype"), where)
        shape = datatypes.known_shape(tensor.get("shape"), where)
        parameters = parameters_of(tensor, where)
        refuse_shared_memory(parameters, where)
        size = parameters.get("binary_data_size")
        if size is None:
            array = datatypes.from_json(tensor.get("data"), kind, shape, where)
        else:
            if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary):
                raise ApiError(400, f"{where}: binary_data_size is {size!r}; {len(binary)} bytes are left")
            if "data" in tensor:
                raise ApiError(400, f"{where} has both data and binary_data_size")
            array = datatypes.from_raw(binary[:size], kind, shape, where)
            binary = binary[size:]
        made.inputs[tensor["name"]], made.datatypes[tensor["name"]] = array, kind
    if len(binary):
        raise ApiError(400, f"{len(binary)} bytes are left behind the last binary input")
    for output in objects(value, "outputs", needed=False):
        parameters = parameters_of(output, f"output '{output['name']}'")
        refuse_shared_memory(parameters, f"output '{output['name']}'")
        made.outputs[output["name"]] = parameters
    return made


def objects(value: dict[str, Any], key: str, *, needed: bool) -> list[dict[str, Any]]:
    """A list of objects with names. Raises ApiError."""
    given = value.get(key)
    if given is None and not needed:
        return []
    if not isinstance(given, list) or not all(
        isinstance(each, dict) and isinstance(each.get("name"), str) for each in given
    ):
        raise ApiError(400, f"{key} must be a list of objects with a name")
    return given


def refuse_shared_memory(parameters: dict[str, Any], where: str) -> None:
    if "shared_memory_region" in parameters:
        raise ApiError(400, f"{where}: shared memory is not supported")


def raw_request(name: str, version: str, model: V2Model, body: bytes) -> InferRequest:
    """A body that is one tensor and nothing else, for a model with one input. Raises ApiError."""
    specs = [spec for spec in model.inputs if not spec.optional]
    if len(specs) != 1:
        raise ApiError(400, f"a raw request needs a model with 1 input; '{name}' has {len(specs)}")
    spec = specs[0]
    if spec.datatype == "BYTES":
        array = datatypes.as_objects([body], (1,) * len(spec.shape))
    else:
        known = int(np.prod([size for size in spec.shape if size != -1], dtype=object)) * datatypes.SIZES[spec.datatype]
        free = spec.shape.count(-1)
        if free and (known == 0 or len(body) % known):
            raise ApiError(400, f"{len(body)} bytes are no whole number of rows of {known} bytes")
        # Batch-1, as in Triton: of several free sizes the last one takes what there is.
        sizes = [1] * (free - 1) + [len(body) // known if known else 0]
        shape = tuple(size if size != -1 else sizes.pop(0) for size in spec.shape)
        array = datatypes.from_raw(body, spec.datatype, shape, f"input '{spec.name}'")
    return InferRequest(name, version, inputs={spec.name: array}, datatypes={spec.name: spec.datatype})


def infer_response(running: Running, outputs: list[Output], *, everything_binary: bool) -> Response:
    """An answer as JSON, with the tensors that were asked for in binary behind it."""
    request = running.request
    binary_default = everything_binary or request.parameters.get("binary_data_output") is True
    tail: list[bytes] = []
    described: list[dict[str, Any]] = []
    for output in outputs:
        entry: dict[str, Any] = {
            "name": output.name, "datatype": output.datatype, "shape": list(output.array.shape)
        }  # fmt: skip
        if output.parameters.get("binary_data", binary_default) is True:
            tail.append(datatypes.to_raw(output.array, output.datatype))
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            entry["data"] = datatypes.to_json(output.array, output.datatype, f"output '{output.name}'")
        described.append(entry)
    head = dump({**names(running), "outputs": described})
    headers = dict(running.passage.headers)
    if not tail:
        return Response(head, media_type="application/json", headers=headers)
    headers[HEADER_LENGTH] = str(len(head))
    return Response(b"".join([head, *tail]), media_type="application/octet-stream", headers=headers)


def names(running: Running) -> dict[str, str]:
    """Who answers what."""
    entry, request = running.entry, running.request
    made = {"model_name": entry.name, "model_version": entry.version}
    return made | {"id": request.id} if request.id else made


def compressed(request: Request, response: Response) -> Response:
    """The response as the client asked for by `Accept-Encoding`, where it names one encoding alone. (tritonclient
    does; HTTP libraries that name several by habit would only lose time.)"""
    wanted = request.headers.get("accept-encoding", "").strip().lower()
    if wanted not in WINDOWS:
        return response
    pack = zlib.compressobj(1, wbits=WINDOWS[wanted])
    response.body = pack.compress(response.body) + pack.flush()
    response.headers["Content-Encoding"] = wanted
    response.headers["Content-Length"] = str(len(response.body))
    return response


async def read_generate(front: Front, request: Request, name: str, version: str) -> InferRequest:
    """A generate request: keys that are the model's inputs are tensors, all others parameters; those inside
    `parameters` count as if they stood outside. Raises ApiError."""
    value = parse_json(await read_bytes(request, front.max_body_bytes))
    identity = value.pop("id", "")
    if not isinstance(identity, str):
        raise ApiError(400, "id must be a string")
    nested = parameters_of(value, "the request")
    value.pop("parameters", None)
    if double := nested.keys() & value.keys():
        raise ApiError(400, f"{', '.join(sorted(double))}: given twice, also in parameters")
    specs = {spec.name: spec for spec in present(front.repository.get(name, version)).inputs}
    made = InferRequest(name, version, identity)
    for key, given in (value | nested).items():
        if key in specs:
            made.inputs[key], made.datatypes[key] = as_tensor(given, specs[key]), specs[key].datatype
        else:
            made.parameters[key] = given
    return made


def as_tensor(given: Any, spec: TensorSpec) -> np.ndarray:
    """A value of JSON as an input: a scalar is a tensor of one element. Raises ApiError."""
    where = f"input '{spec.name}'"
    if not isinstance(given, list):
        return datatypes.from_json([given], spec.datatype, (1,) * len(spec.shape), where)
    shape: list[int] = []
    inner: Any = given
    while isinstance(inner, list) and len(shape) < len(spec.shape):
        shape.append(len(inner))
        inner = inner[0] if inner else None
    shape = [1] * (len(spec.shape) - len(shape)) + shape  # a plain list for a model with batches is a batch of 1
    return datatypes.from_json(given, spec.datatype, tuple(shape), where)


def generated(running: Running, outputs: list[Output]) -> dict[str, Any]:
    """An answer of generate: outputs by name, those of one element as a scalar."""
    made: dict[str, Any] = dict(names(running))
    for output in outputs:
        values = datatypes.to_json(output.array, output.datatype, f"output '{output.name}'")
        made[output.name] = values[0] if len(values) == 1 else values
    return made


async def events(running: Running) -> AsyncIterator[bytes]:
    """Answers as server-sent events; an error is the last one."""
    try:
        async for outputs in running:
            yield sse(generated(running, outputs))
    except Exception as error:  # noqa: BLE001  (the status line is gone: an event is all that can still be said)
        yield sse(error_response(as_api_error(error), "/v2/"))


def sse(value: dict[str, Any]) -> bytes:
    return b"data: " + dump(value) + b"\n\n"


def dump(value: dict[str, Any]) -> bytes:
    """JSON; arrays of numbers are lists, float32 in the fewest digits that read back as the same float32."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


class V2Stream(StreamingResponse):
    """A stream that ends its request however it ends itself: read whole, broken off, or failed."""

    def __init__(self, running: Running) -> None:
        headers = {"Cache-Control": "no-cache", **running.passage.headers}
        super().__init__(events(running), media_type="text/event-stream", headers=headers)
        self.running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.running.leave()

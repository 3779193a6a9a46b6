"""The Open Inference Protocol V2 over gRPC, in the event loop of the HTTP server: the same models, keys and gates.

Keys come as metadata `authorization: Bearer KEY` or `x-api-key`. What HTTP says with a status is a gRPC code here,
`Retry-After` is the trailing metadata `retry-after` (seconds). Deadlines reach the engine; a call that is cancelled or
whose client is gone stops what it runs. Health is grpc.health.v1, with the models as services; reflection is on.
Source: open_inference_grpc.proto; Triton's grpc_service.proto and docs/protocol/extension_*.md.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from soma.base.errors import UserError
from soma.serve.addresses import TrustedProxies
from soma.serve.calls import Caller
from soma.serve.errors import ApiError, as_api_error
from soma.serve.v2.front import Front
from soma.serve.v2.messages import as_response, parameters_of, pb, read_request
from soma.serve.v2.model import Origin

SERVICE = "inference.GRPCInferenceService"
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT, 401: grpc.StatusCode.UNAUTHENTICATED,
    402: grpc.StatusCode.RESOURCE_EXHAUSTED, 403: grpc.StatusCode.PERMISSION_DENIED, 404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT, 429: grpc.StatusCode.RESOURCE_EXHAUSTED, 503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}  # fmt: skip
IN_FLIGHT = 64  # requests of one ModelStreamInfer that run at once
HEALTH_POLL = 0.25  # seconds between looks of a health Watch
COMPRESSIONS = {"none": grpc.Compression.NoCompression, "gzip": grpc.Compression.Gzip,
                "deflate": grpc.Compression.Deflate}  # fmt: skip


class Admits(Protocol):
    """Finds out who asks: `soma.serve.keys.door.Guard`."""

    def admit(self, given: Sequence[str], address: str, path: str) -> Caller:
        """Raises ApiError."""


class Door:
    """Who calls, and from where. `guard` None: no keys are asked for."""

    def __init__(self, guard: Admits | None, proxies: TrustedProxies) -> None:
        self.guard, self.proxies = guard, proxies

    def origin(self, context: Any, method: str) -> Origin:
        """Raises ApiError for who may not call the method."""
        metadata = [(key, value) for key, value in context.invocation_metadata() or () if isinstance(value, str)]
        forwarded = [value for key, value in metadata if key == "x-forwarded-for"]
        address = self.proxies.client(peer_address(context.peer()), forwarded)
        path = f"/{SERVICE}/{method}"
        caller = None if self.guard is None else self.guard.admit(credentials(metadata), address, path)
        return Origin(path, address, caller, context.time_remaining())


def credentials(metadata: Sequence[tuple[str, str]]) -> list[str]:
    """Every key in the metadata; what is no bearer token counts as a key that nobody has."""
    found = []
    for name, value in metadata:
        if name == "x-api-key":
            found.append(value.strip())
        elif name == "authorization":
            scheme, _, rest = value.strip().partition(" ")
            found.append(rest.strip() if scheme.lower() == "bearer" else "")
    return found


def peer_address(peer: str) -> str:
    """The address in gRPC's name of a peer: `ipv6:%5B::1%5D:40000` is `::1`, `ipv4:10.0.0.1:40000` is `10.0.0.1`."""
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ""
    return unquote(rest).rpartition(":")[0].strip("[]")


async def refuse(context: Any, error: Exception) -> None:
    """End the call with what the client is told of an exception."""
    known = as_api_error(error)
    trailing = [] if known.retry_after is None else [("retry-after", str(known.retry_after))]
    await context.abort(CODES.get(known.status, grpc.StatusCode.INTERNAL), known.message, tuple(trailing))


class InferenceService:
    """The methods of inference.GRPCInferenceService."""

    def __init__(self, front: Front, door: Door) -> None:
        self.front, self.door = front, door

    def handlers(self) -> grpc.GenericRpcHandler:
        """What gRPC calls: the methods of the .proto file are those below, in snake case."""
        made = {}
        for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
            coders = {
                "request_deserializer": lenient(getattr(pb, method.input_type.name)),
                "response_serializer": getattr(pb, method.output_type.name).SerializeToString,
            }
            if method.client_streaming:
                made[method.name] = grpc.stream_stream_rpc_method_handler(self.model_stream_infer, **coders)
            else:
                made[method.name] = grpc.unary_unary_rpc_method_handler(self.unary(method.name), **coders)
        return grpc.method_handlers_generic_handler(SERVICE, made)

    def unary(self, name: str) -> Callable[[Any, Any], Awaitable[Any]]:
        """A method of one answer: it admits its caller and turns exceptions into codes."""
        method = getattr(self, re.sub("(?<!^)(?=[A-Z])", "_", name).lower())

        async def call(request: Any, context: Any) -> Any:
            try:
                origin = ANYBODY if name in ("ServerLive", "ServerReady") else self.door.origin(context, name)
                return await method(readable(request), origin)
            except Exception as error:  # noqa: BLE001  (the client is told)
                return await refuse(context, error)

        return call

    async def server_live(self, request: Any, origin: Origin) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def server_ready(self, request: Any, origin: Origin) -> Any:
        return pb.ServerReadyResponse(ready=self.front.ready)

    async def model_ready(self, request: Any, origin: Origin) -> Any:
        return pb.ModelReadyResponse(ready=self.front.is_ready(request.name, request.version, origin.caller))

    async def server_metadata(self, request: Any, origin: Origin) -> Any:
        return pb.ServerMetadataResponse(**self.front.metadata())

    async def model_metadata(self, request: Any, origin: Origin) -> Any:
        found = await self.front.model_metadata(request.name, request.version, origin.caller)
        return pb.ModelMetadataResponse(**found)

    async def model_statistics(self, request: Any, origin: Origin) -> Any:
        found = self.front.statistics(request.name, request.version, origin.caller)
        return pb.ModelStatisticsResponse(model_stats=found)

    async def repository_index(self, request: Any, origin: Origin) -> Any:
        found = self.front.index(only_ready=request.ready, caller=origin.caller)
        return pb.RepositoryIndexResponse(models=found)

    async def repository_model_load(self, request: Any, origin: Origin) -> Any:
        await self.front.load(request.model_name, parameters_of(request.parameters))
        return pb.RepositoryModelLoadResponse()

    async def repository_model_unload(self, request: Any, origin: Origin) -> Any:
        await self.front.unload(request.model_name)  # its parameter `unload_dependents`: there are none
        return pb.RepositoryModelUnloadResponse()

    async def model_infer(self, request: Any, origin: Origin) -> Any:
        running = await self.front.start(read_request(request), origin)
        async with running:
            return as_response(running, await running.only(), raw=wants_raw(request))

    async def model_stream_infer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Requests and answers on one connection, as Triton's: an error answers its request and leaves the stream
        open, unless the metadata `triton_grpc_error: true` asks for the call to end with it. Answers of models that
        give one each come in the order of the requests; a model that gives many sends them as they come."""
        try:
            origin = self.door.origin(context, "ModelStreamInfer")
        except Exception as error:  # noqa: BLE001
            await refuse(context, error)
        strict = ("triton_grpc_error", "true") in (context.invocation_metadata() or ())
        stream = Stream(self.front, origin)
        reader = asyncio.create_task(stream.read(requests))
        try:
            while (answer := await stream.answers.get()) is not None:
                if isinstance(answer, tuple):
                    failure, identity = answer
                    if strict:
                        await refuse(context, failure)
                    told = as_api_error(failure).message
                    answer = pb.ModelStreamInferResponse(
                        error_message=told, infer_response=pb.ModelInferResponse(id=identity)
                    )  # fmt: skip
                yield answer
            await reader
        finally:
            reader.cancel()
            await stream.stop()


def lenient(kind: Any) -> Callable[[bytes], Any]:
    """Reads messages of a kind; None for what is none. (gRPC itself would write a traceback into the log for each.)"""

    def read(data: bytes) -> Any:
        try:
            return kind.FromString(data)
        except DecodeError:
            return None

    return read


def readable(message: Any) -> Any:
    """The message. Raises ApiError if it could not be read."""
    if message is None:
        raise ApiError(400, "the message could not be read: it is none of this method")
    return message


ANYBODY = Origin("", "")


def wants_raw(request: Any) -> bool:
    """Whether the tensors of the answer should be raw: those of the request were, or there were none."""
    return bool(request.raw_input_contents) or not any(tensor.HasField("contents") for tensor in request.inputs)


class Stream:
    """The requests of one ModelStreamInfer. `answers`: responses, or an error with the id of its request; None at the
    end."""

    def __init__(self, front: Front, origin: Origin) -> None:
        self.front, self.origin = front, origin
        self.answers: asyncio.Queue[Any] = asyncio.Queue(IN_FLIGHT)
        self.places = asyncio.Semaphore(IN_FLIGHT)
        self.tasks: set[asyncio.Task[None]] = set()

    async def read(self, requests: AsyncIterator[Any]) -> None:
        """Start every request that comes; at the end wait for them all."""
        try:
            before: asyncio.Future[None] | None = None
            async for request in requests:
                await self.places.acquire()
                done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                task = asyncio.create_task(self.answer(request, before, done))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)
                before = done
            if self.tasks:
                await asyncio.wait(self.tasks)
        finally:
            await self.answers.put(None)

    async def answer(self, request: Any, before: "asyncio.Future[None] | None", done: "asyncio.Future[None]") -> None:
        """Run one request. `before`: done when the request before has been answered; `done`: ours."""
        try:
            await self.run(request, before)
        except Exception as error:  # noqa: BLE001  (the client is told)
            if before is not None:
                await before
            await self.answers.put((error, "" if request is None else request.id))
        finally:
            self.places.release()
            if not done.done():
                done.set_result(None)

    async def run(self, request: Any, before: "asyncio.Future[None] | None") -> None:
        asked = read_request(readable(request))
        with_end = asked.parameters.pop("triton_enable_empty_final_response", False) is True
        running = await self.front.start(asked, self.origin, stream=True)
        decoupled = running.model.decoupled
        async with running:
            async for outputs in running:
                made = as_response(running, outputs, raw=wants_raw(request))
                made.parameters["triton_final_response"].bool_param = not decoupled
                if before is not None and not decoupled:
                    await before
                await self.answers.put(pb.ModelStreamInferResponse(infer_response=made))
        if decoupled and with_end:
            end = as_response(running, (), raw=True)
            end.parameters["triton_final_response"].bool_param = True
            await self.answers.put(pb.ModelStreamInferResponse(infer_response=end))

    async def stop(self) -> None:
        """Cancel what still runs and wait until it has given everything back."""
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks)


class HealthService(health_pb2_grpc.HealthServicer):
    """grpc.health.v1, which asks for no key: the server under "" and its service's name; models under theirs, unless
    the names of models are for keys to know."""

    def __init__(self, front: Front, *, tells_models: bool) -> None:
        self.front, self.tells_models = front, tells_models

    def status(self, name: str) -> Any:
        """None for a service that is not known."""
        kinds = health_pb2.HealthCheckResponse
        if name in ("", SERVICE):
            return kinds.SERVING if self.front.ready else kinds.NOT_SERVING
        if not self.tells_models:
            return None
        try:
            return kinds.SERVING if self.front.is_ready(name) else kinds.NOT_SERVING
        except ApiError:
            return None

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        if (status := self.status(request.service)) is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        said = None
        while True:
            status = self.status(request.service)
            if status is None:
                status = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            if status != said:
                said = status
                yield health_pb2.HealthCheckResponse(status=status)
            await asyncio.sleep(HEALTH_POLL)


class GrpcServer:
    """The listener. Make it inside the event loop that it runs in.

    port 0 takes a free one: `port` is the one that it has. compression: of answers, none, gzip or deflate; requests
    may be compressed as they like. Raises UserError: a port in use, a compression that is not known.
    """

    def __init__(
        self, front: Front, host: str, port: int, *, guard: Admits | None = None,
        proxies: TrustedProxies | None = None, compression: str = "none",
    ) -> None:  # fmt: skip
        if compression not in COMPRESSIONS:
            raise UserError(f"grpc compression {compression!r}; expected one of {', '.join(COMPRESSIONS)}")
        self.server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", front.max_body_bytes), ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
            compression=COMPRESSIONS[compression],
        )  # fmt: skip
        service = InferenceService(front, Door(guard, proxies or TrustedProxies()))
        self.server.add_generic_rpc_handlers((service.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(HealthService(front, tells_models=guard is None), self.server)
        pool = pb.DESCRIPTOR.pool
        for described in (health_pb2.DESCRIPTOR, reflection._reflection_pb2.DESCRIPTOR):
            pool.AddSerializedFile(described.serialized_pb)
        names = (SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server, pool)
        name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port = self.server.add_insecure_port(name)
        except RuntimeError:
            raise UserError(
                f"grpc port {port} on {host} cannot be had: stop what listens there, or take another one (--grpc-port)"
            ) from None

    async def start(self) -> None:
        """Take calls."""
        await self.server.start()

    async def stop(self, grace: float) -> None:
        """No new calls; those that run have `grace` seconds."""
        await self.server.stop(grace)

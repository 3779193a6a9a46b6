"""Load for benchmarks/v2_infer.py: asks `echo` in a closed loop.

    python v2_load.py KIND ADDRESS COLUMNS SECONDS CLIENTS

KIND: json, binary (REST), grpc (raw contents), grpc_typed (fp32_contents). Prints requests a second. Requests are
encoded once; answers are received whole and not decoded, so that the client is light and the same for both servers.
"""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable

import numpy as np


def tensor(columns: int) -> np.ndarray:
    return np.random.default_rng(0).random((1, columns), np.float32)


def json_body(columns: int) -> bytes:
    x = tensor(columns)
    given = {"name": "x", "datatype": "FP32", "shape": [1, columns], "data": x.ravel().tolist()}
    return json.dumps({"inputs": [given]}).encode()


def binary_body(columns: int) -> tuple[bytes, dict[str, str]]:
    raw = tensor(columns).tobytes()
    given = {"name": "x", "datatype": "FP32", "shape": [1, columns], "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [given], "parameters": {"binary_data_output": True}}).encode()
    return head + raw, {"Inference-Header-Content-Length": str(len(head))}


def grpc_body(columns: int, *, typed: bool) -> bytes:
    from soma.serve.v2.messages import pb

    request = pb.ModelInferRequest(model_name="echo")
    given = request.inputs.add(name="x", datatype="FP32", shape=[1, columns])
    if typed:
        given.contents.fp32_contents.extend(tensor(columns).ravel().tolist())
    else:
        request.raw_input_contents.append(tensor(columns).tobytes())
    return bytes(request.SerializeToString())


async def load(kind: str, address: str, columns: int, seconds: float, clients: int) -> float:
    """Requests a second."""
    if kind in ("json", "binary"):
        import aiohttp

        body, headers = json_body(columns), {"Content-Type": "application/json"}
        if kind == "binary":
            body, headers = binary_body(columns)
        url = f"http://{address}/v2/models/echo/infer"
        async with aiohttp.ClientSession() as session:

            async def post() -> None:
                async with session.post(url, data=body, headers=headers) as answer:
                    assert answer.status == 200, await answer.text()
                    await answer.read()

            return await closed_loop(post, clients, seconds)
    import grpc

    data = grpc_body(columns, typed=kind == "grpc_typed")
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

        async def call() -> None:
            await method(data)

        return await closed_loop(call, clients, seconds)


async def closed_loop(one: Callable[[], Awaitable[None]], clients: int, seconds: float) -> float:
    """Every client asks again when it has its answer; what was asked before the time was over counts."""
    await one()
    started = time.perf_counter()

    async def client() -> int:
        count = 0
        while time.perf_counter() - started < seconds:
            await one()
            count += 1
        return count

    done = sum(await asyncio.gather(*(client() for _ in range(clients))))
    return done / (time.perf_counter() - started)


if __name__ == "__main__":
    kind, address, columns, seconds, clients = sys.argv[1:]
    print(asyncio.run(load(kind, address, int(columns), float(seconds), int(clients))))

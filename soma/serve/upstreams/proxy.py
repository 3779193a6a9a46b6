"""One request on its way to an upstream and back: an upstream is chosen, and another if that one fails before the
client has seen anything; the answer is passed on as it comes, counted, and cancelled there when the client leaves here.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import aiohttp
from starlette.types import Send

from soma.serve import errors
from soma.serve.calls import Call, Usage
from soma.serve.errors import ApiError
from soma.serve.graphs.trace import is_on, propagated
from soma.serve.upstreams.pool import Pool, Upstream, prompt_bytes
from soma.serve.upstreams.stream import BadStreamError, EventReader, usage_of

if TYPE_CHECKING:
    from soma.serve.upstreams.app import Front

log = logging.getLogger("soma.serve")

AGAIN = frozenset((408, 429, 500, 502, 503, 504))  # statuses that another upstream may do better than
STREAMED = ("/v1/chat/completions", "/v1/completions")  # where usage must be asked for
MOST_WHOLE = 64 << 20  # bytes of an answer that is no stream


class GoneError(Exception):
    """An upstream did not answer."""


class Refused(Exception):  # noqa: N818  (an answer, not a mistake)
    """An upstream's own error, which the client gets if nobody does better."""

    def __init__(self, status: int, kind: str, body: bytes, retry_after: str | None) -> None:
        super().__init__(status)
        self.status, self.kind, self.body, self.retry_after = status, kind, body, retry_after


class Exchange:
    """A request whose call has passed the gates. `usage` is what it used, however it ends."""

    def __init__(self, front: "Front", call: Call, value: dict[str, Any], raw: bytes, send: Send) -> None:
        self.front, self.call, self.value, self.raw, self.send = front, call, value, raw, send
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_stream = value.get("stream") is True
        options = value.get("stream_options")
        self.wants_usage = isinstance(options, dict) and options.get("include_usage") is True
        self.asks_usage = self.is_stream and not self.wants_usage and call.route in STREAMED
        self.reader = EventReader(self.wants_usage)
        self.told: Any = None  # the upstream's words about usage
        self.begun = self.ended = self.sent = False  # towards the client; towards an upstream
        self.only_heartbeats = False  # all that the client has seen
        self.outcome = "error"

    def tell(self, headers: dict[str, str]) -> None:
        """Headers for the answer."""
        self.headers = [(name.encode(), text.encode("latin-1")) for name, text in headers.items()]

    @property
    def usage(self) -> Usage:
        """What was used. Nothing, if nothing was sent to an upstream that took it."""
        told = self.told or self.reader.usage
        if not self.sent and told is None:
            return Usage(outcome=self.outcome)
        return usage_of(told, self.outcome, self.call.prompt_tokens, max(0, self.reader.events))

    async def run(self, pool: Pool) -> None:
        """Answer the client. Raises ApiError as long as the client has seen nothing."""
        try:
            await self._tries(pool)
        except (ApiError, GoneError) as error:
            known = error if isinstance(error, ApiError) else ApiError(
                502, "the upstream broke off", code="upstream_failed")  # fmt: skip
            if not self.begun:
                raise known from None
            await self._body(errors.sse_error(known) + b"data: [DONE]\n\n", last=True)

    async def _tries(self, pool: Pool) -> None:
        """Ask one upstream after the other, then those of the fallbacks."""
        refused: Refused | None = None
        attempts, waited, tried = 0, False, set[Upstream]()
        most = pool.config.retry.attempts
        pool.budget.earn()
        for each in (pool, *(self.front.pools[name] for name in pool.config.fallback if name in self.front.pools)):
            while attempts < most:
                upstream = each.pick(tried, lambda: prompt_bytes(self.value))
                if upstream is None and each.config.wake is not None and not waited:
                    await self._wait_awake(each)
                    waited, attempts = True, 0
                    tried.clear()
                    continue
                if upstream is None or (attempts and not pool.budget.spend()):
                    break
                attempts += 1
                tried.add(upstream)
                self.front.metrics.tries.labels(each.name).inc()
                upstream.begin()
                try:
                    await self._ask(upstream, each)
                    return
                except Refused as error:
                    refused = error
                    if error.status not in AGAIN:
                        break
                except GoneError:
                    if self.begun and not self.only_heartbeats:
                        raise
                finally:
                    upstream.end()
            if refused is not None and refused.status not in AGAIN:
                break
        if refused is not None:
            await self._refuse(refused)
            return
        words = "no upstream answers" if tried else "no upstream is there"
        raise ApiError(503, f"{words} for the model `{pool.name}`; try again soon", code="no_upstream",
                       retry_after=pool.retry_after)  # fmt: skip

    async def _wait_awake(self, pool: Pool) -> None:
        """Hold the request until an upstream is there; a stream says that it waits. Raises ApiError 503."""
        wake = pool.config.wake
        assert wake is not None
        if pool.waiting >= wake.waiting:
            raise ApiError(503, f"{wake.waiting} requests wait for `{pool.name}` to wake already", code="queue_full",
                           retry_after=10)  # fmt: skip
        pool.waiting += 1
        try:
            awake = self.front.awake(pool)
            for _ in range(max(1, wake.timeout // wake.heartbeat)):
                done, _pending = await asyncio.wait({awake}, timeout=wake.heartbeat / 1000)
                if done:
                    return
                if self.is_stream:
                    await self._begin()
                    self.only_heartbeats = True
                    await self._body(b": waking\n\n")
        finally:
            pool.waiting -= 1

    async def _ask(self, upstream: Upstream, pool: Pool) -> None:
        """Send the request and pass the answer on. Raises Refused, GoneError."""
        limits = pool.config.timeouts
        timeout = aiohttp.ClientTimeout(total=limits.whole / 1000, sock_connect=limits.connect / 1000)
        self.reader = EventReader(self.wants_usage)
        url = upstream.config.url + self.call.route.removeprefix("/v1")
        headers = {**upstream.headers, "X-Request-Id": self.call.id, **(propagated() if is_on() else {})}
        try:
            if self.call.meter is not None:
                self.call.meter.sent()
            async with asyncio.timeout(limits.first_token / 1000 if self.is_stream else None) as first:
                async with self.front.session.post(
                    url, data=self._data(upstream), headers=headers, timeout=timeout, allow_redirects=False
                ) as answer:  # fmt: skip
                    if answer.status != 200:
                        await self._failed(upstream, answer)
                    self.sent = True
                    if self.is_stream and "event-stream" in answer.headers.get("Content-Type", ""):
                        await self._stream(upstream, answer, first, limits.between_tokens / 1000)
                    else:
                        first.reschedule(None)
                        await self._whole(upstream, answer)
        except (aiohttp.ClientError, TimeoutError, OSError, BadStreamError) as error:
            upstream.failed()
            if isinstance(error, aiohttp.ClientConnectorError):
                self.sent = False
            log.warning("upstream %s failed: %s", upstream.config.url, type(error).__name__)
            raise GoneError from None

    def _data(self, upstream: Upstream) -> bytes:
        """The body for an upstream: as it came, unless the model has another name there or usage must be asked for."""
        name = upstream.config.model
        if not self.asks_usage and name in (None, self.value["model"]):
            return self.raw
        value = {**self.value, "model": name or self.value["model"]}
        if self.asks_usage:
            value["stream_options"] = {**(self.value.get("stream_options") or {}), "include_usage": True}
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()

    async def _failed(self, upstream: Upstream, answer: aiohttp.ClientResponse) -> None:
        """Take note of an error. 429 and 503 with Retry-After are no failure: it asks for a pause."""
        body = await answer.content.read(1 << 20)
        asked = answer.headers.get("Retry-After")
        if answer.status in (429, 503) and asked is not None and asked.isdigit():
            upstream.pause(int(asked))
        elif answer.status in AGAIN and answer.status != 429:
            upstream.failed()
        raise Refused(answer.status, answer.headers.get("Content-Type", "application/json"), body, asked)

    async def _stream(
        self, upstream: Upstream, answer: aiohttp.ClientResponse, first: asyncio.Timeout, between: float
    ) -> None:
        """Pass events on. Before the first the upstream may still be given up for another."""
        loop, meter, record, seen = asyncio.get_running_loop(), self.call.meter, self.call.record, 0
        async for data in self._chunks(answer):
            first.reschedule(None)  # a client that reads slowly is not the upstream's fault
            ready = self.reader.feed(data)
            if meter is not None and self.reader.events > seen:
                meter.made(self.reader.events - seen)
                seen = self.reader.events
            if not ready:
                first.reschedule(loop.time() + between)
                continue
            if record is not None:
                record.heard(ready)
            await self._begin()
            self.only_heartbeats = False
            if self.reader.is_done:
                upstream.succeeded()
                self.outcome = "error" if self.reader.has_failed else "ok"
                await self._body(ready, last=True)
                return
            await self._body(ready)
            first.reschedule(loop.time() + between)
        raise aiohttp.ClientPayloadError("the stream ended before [DONE]")

    @staticmethod
    async def _chunks(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        while data := await answer.content.readany():
            yield data

    async def _whole(self, upstream: Upstream, answer: aiohttp.ClientResponse) -> None:
        """Pass an answer on that is no stream, once all of it is there."""
        body = await answer.content.read(MOST_WHOLE)
        while not answer.content.at_eof():
            body += await answer.content.readany()
            if len(body) > MOST_WHOLE:
                raise BadStreamError
        upstream.succeeded()
        try:
            value = json.loads(body)
            self.told = value.get("usage") if isinstance(value, dict) else None
        except ValueError:
            raise BadStreamError from None
        if self.call.meter is not None and isinstance(self.told, dict):
            self.call.meter.made(usage_of(self.told, "ok", 0, 0).completion_tokens)
        if self.call.record is not None:
            self.call.record.heard(b"data: " + body.replace(b"\n", b" ") if self.is_stream else body)
        self.outcome = "ok"
        if self.begun:  # it was held as a stream
            await self._body(b"data: " + body + b"\n\ndata: [DONE]\n\n", last=True)
            return
        await self._begin(200, "application/json", len(body))
        await self._body(body, last=True)

    async def _refuse(self, refused: Refused) -> None:
        """Give the client an upstream's error. What was reserved is given back: nothing was made."""
        if self.begun:
            try:
                told = json.loads(refused.body)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                told = "the upstream refused"
            await self._body(errors.sse_error(ApiError(refused.status, str(told))) + b"data: [DONE]\n\n", last=True)
            return
        if refused.retry_after is not None:
            self.headers.append((b"retry-after", refused.retry_after.encode()))
        await self._begin(refused.status, refused.kind, len(refused.body))
        await self._body(refused.body, last=True)

    async def _begin(self, status: int = 200, kind: str = "text/event-stream; charset=utf-8", length: int = -1) -> None:
        if self.begun:
            return
        self.begun = True
        headers = [(b"content-type", kind.encode()), *self.headers]
        headers.append((b"cache-control", b"no-cache") if length < 0 else (b"content-length", str(length).encode()))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def _body(self, data: bytes, last: bool = False) -> None:
        self.ended = self.ended or last
        await self.send({"type": "http.response.body", "body": data, "more_body": not last})

"""A limit on the time in which a request's headers must come: uvicorn has none, so that a client that sends a byte now
and then could keep a connection for ever (Slowloris).
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADER_SECONDS = 20.0
ANSWER = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class LimitsHeaders(asyncio.Protocol):
    """Goes before a protocol class of uvicorn's. The time runs from the connection's start, and later from the first
    byte of a request whose headers do not come at once; how long a connection may be idle between requests is uvicorn's
    `timeout_keep_alive`."""

    cycle: Any  # uvicorn's: the request under way, or the last one
    loop: asyncio.AbstractEventLoop
    transport: Any
    header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self.header_timer is None:
            self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_headers(self) -> None:
        self.header_timer = self.loop.call_later(HEADER_SECONDS, self._too_slow)

    def _stop_waiting(self) -> None:
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None

    def _too_slow(self) -> None:
        self.header_timer = None
        if not self.transport.is_closing():
            self.transport.write(ANSWER)
            self.transport.close()


class HeaderTimeout(LimitsHeaders, AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """The protocol of httptools, or of h11 where that is not installed."""

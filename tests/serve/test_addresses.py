"""Client addresses: what proxies that nobody named say is not believed."""

import asyncio
from typing import Any

import pytest

from soma.base.errors import UserError
from soma.serve.addresses import Addresses, TrustedProxies


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "client"),
    [
        ([], "203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        (["10.0.0.0/8"], "203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        (["10.0.0.0/8"], "10.1.1.1", ["198.51.100.1"], "198.51.100.1"),
        (["10.0.0.0/8"], "10.1.1.1", [], "10.1.1.1"),
        # The client wrote the first entry itself: only what the proxy added is believed.
        (["10.0.0.0/8"], "10.1.1.1", ["127.0.0.1, 198.51.100.1"], "198.51.100.1"),
        (["10.0.0.0/8"], "10.1.1.1", ["127.0.0.1", "198.51.100.1, 10.2.2.2"], "198.51.100.1"),
        (["10.0.0.0/8"], "10.1.1.1", ["10.3.3.3, 10.2.2.2"], "10.3.3.3"),
        (["10.0.0.0/8"], "10.1.1.1", ["198.51.100.1, nonsense"], "10.1.1.1"),
        (["10.0.0.0/8"], "10.1.1.1", ["198.51.100.1, nonsense, 10.2.2.2"], "10.2.2.2"),
        (["10.0.0.0/8"], "10.1.1.1", ["198.51.100.1:4711"], "198.51.100.1"),
        (["::1"], "::1", ['"[2001:db8::7]:4711"'], "2001:db8::7"),
        (["10.0.0.0/8"], "::ffff:10.1.1.1", ["::ffff:198.51.100.1"], "198.51.100.1"),
        (["10.0.0.0/8"], "", ["198.51.100.1"], ""),
    ],
)
def test_client(trusted: list[str], peer: str, forwarded: list[str], client: str) -> None:
    assert TrustedProxies(trusted).client(peer, forwarded) == client


@pytest.mark.parametrize("text", ["proxy.example", "10.0.0.1/8", ""])
def test_no_network(text: str) -> None:
    with pytest.raises(UserError, match="trusted proxy"):
        TrustedProxies([text])


def test_middleware() -> None:
    seen: dict[str, Any] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope["state"])

    headers = [(b"x-forwarded-for", b"198.51.100.1"), (b"x-forwarded-for", b"10.0.0.9")]
    scope = {"type": "http", "client": ("10.0.0.1", 5), "headers": headers}
    asyncio.run(Addresses(app, TrustedProxies(["10.0.0.0/8"]))(scope, None, None))  # type: ignore[arg-type]
    assert seen == {"address": "198.51.100.1"}

"""Where a request comes from. `X-Forwarded-For` is what anybody may write; it counts only as far as named proxies
wrote it (RFC 7239, section 8.1; the rule of nginx' real_ip_recursive).
"""

import ipaddress
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from soma.base.errors import UserError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class TrustedProxies:
    """The proxies whose word about a client's address is taken. Raises UserError for what is no address or network."""

    def __init__(self, networks: Sequence[str] = ()) -> None:
        self.networks = [self._network(each) for each in networks]

    @staticmethod
    def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        try:
            return ipaddress.ip_network(text)
        except ValueError as error:
            raise UserError(
                f"trusted proxy {text!r}: {error}; expected an address or a network as 10.0.0.0/8"
            ) from None

    def trusts(self, address: Address) -> bool:
        """Whether that is one of the proxies."""
        return any(address in network for network in self.networks)

    def client(self, peer: str, forwarded: Sequence[str]) -> str:
        """The address of the client. peer: who opened the connection; forwarded: values of `X-Forwarded-For`, in order.

        Read from the right, past proxies that are named; what is left of the first that is not may be a lie. An entry
        that is no address ends the reading at the proxy that wrote it.
        """
        address = parse(peer)
        if address is None:
            return peer
        hops = [hop for value in forwarded for hop in value.split(",")] if self.networks else []
        while hops and self.trusts(address):
            before = parse(hops.pop())
            if before is None:
                break
            address = before
        return str(address)


def parse(text: str) -> Address | None:
    """An address, with or without a port; IPv4 written as IPv6 becomes IPv4. None for anything else."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def client_address(scope: Scope, proxies: TrustedProxies) -> str:
    """The client's address of an ASGI scope; empty where the connection has none (a socket in the file system)."""
    peer = scope["client"][0] if scope.get("client") else ""
    forwarded = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
    return proxies.client(peer, forwarded)


class Addresses:
    """ASGI middleware: sets `request.state.address`."""

    def __init__(self, app: ASGIApp, proxies: TrustedProxies) -> None:
        self.app, self.proxies = app, proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {})["address"] = client_address(scope, self.proxies)
        await self.app(scope, receive, send)

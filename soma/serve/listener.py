"""Where a service listens: an address that others may reach only if somebody said so, and words for what fails."""

import errno
import ipaddress
import socket

from soma.base.errors import UserError


def check_host(host: str, *, allow_public: bool) -> None:
    """Refuse to listen beyond this machine unless told to. Raises UserError."""
    if allow_public or host == "localhost":
        return
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise UserError(
            f"host {host}: other machines could reach the service, and it asks nobody for a key. Give it keys (--keys "
            "DATABASE, `soma keys create`), use 127.0.0.1, or say allow_public (--allow-public) if everybody who "
            "reaches the port may use the model"
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; UserError that says what to do if it cannot be had."""
    if not 0 <= port <= 65535:
        raise UserError(f"port {port}: expected 0 to 65535 (0 takes a free one)")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise UserError(f"host {host}: {error.strerror}") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} on {host} is in use: stop what listens there, or take another one (--port)"
            ) from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} needs privileges: take one above 1023 (--port)") from None
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


def base_url(listener: socket.socket) -> str:
    """http://host:port of a socket, with an address that a client can use."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

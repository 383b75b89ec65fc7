"""The socket that a server listens on, and its address."""

import ipaddress
import re
import socket

from ..errors import UsageError


def open_listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; port 0 is any that is free.

    Raises:
        UsageError: there is no such address, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"there is no address {host!r}: {error}", "a name or address of this machine") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()  # two servers can bind one port as long as none listens
    except OSError as error:
        bound.close()
        raise UsageError(
            f"the server cannot listen at {host}, port {port}: {error.strerror}",
            "a free port above 1023",
            "--port 0 takes any",
        ) from error
    return bound


def format_server_address(listening_socket: socket.socket) -> str:
    """Return the address by which this machine reaches a socket that listens, such as `http://127.0.0.1:8000`."""
    host, port = listening_socket.getsockname()[:2]
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}"


def parse_host_header_or_none(header: str) -> str | None:
    """Return the name or address, in lower case and with its brackets, of a Host header; None if it is malformed."""
    match = re.fullmatch(r"(\[[0-9a-f:.%]+\]|[^:\[\]]+)(:[0-9]*)?", header.lower())
    return match and match[1]


def is_loopback(address: str) -> bool:
    """Return whether a server bound to this address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"

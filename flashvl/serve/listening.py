"""The port of a service: known to be free before anything is started, and kept until it is used."""

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from flashvl.errors import ConfigError


@contextmanager
def reserved_port(host: str, port: int, *, is_held: bool) -> Iterator[int]:
    """The port, which no other program can take meanwhile; with 0, any that is free.

    The socket that holds it does not listen, and lets sockets of this user's bind the same address
    as Serve's proxies do (SO_REUSEPORT). Two services that only did that would share a port without
    knowing it, and each would answer a part of the requests.

    Args:
        is_held: False where another user's processes are to listen there.

    Raises:
        ConfigError: something listens there, the address is none of this machine's, or this user
            may not listen there.
    """
    with _bind(host, port) as holder:
        port = holder.getsockname()[1]
        if is_held:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        else:
            holder.close()
        yield port


def _bind(host: str, port: int) -> socket.socket:
    """A socket that shares its port with nobody.

    Where connections of a service that has ended are still about, it shares it with who asks for
    it in the same way.
    """
    for is_shared in (False, True):
        holder = socket.socket(socket.AF_INET6 if _is_ipv6(host) else socket.AF_INET)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, is_shared)
        try:
            holder.bind((host, port))
            return holder
        except OSError as error:
            holder.close()
            reason = error.strerror or str(error)
    raise ConfigError(
        f"cannot listen at {address_of(host, port)}: {reason}; end what listens there, or choose"
        " another --port or --host"
    )


def address_of(host: str, port: int) -> str:
    """As in a URL, where an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if _is_ipv6(host) else f"{host}:{port}"


def _is_ipv6(host: str) -> bool:
    """As Serve decides it: names are taken for IPv4."""
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False

"""The port of a service: known to be free before anything starts, and held until it is used."""

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from flashvl.errors import ConfigError


@contextmanager
def reserved_port(host: str, port: int, *, is_held: bool) -> Iterator[int]:
    """Hold a port that no other program can take meanwhile, and yield it; 0 takes any free port.

    The socket that holds the port does not listen. It lets this user's other sockets bind the same
    address, as Serve's proxies do (SO_REUSEPORT). If two services did only that, they would share a
    port unawares, and each would answer a part of the requests.

    Args:
        is_held: whether to hold the port after checking it; False where another user's processes
            are to listen there.

    Raises:
        ConfigError: another program listens there, the address is not one of this machine's, or
            this user may not listen there.
    """
    with _bind(host, port) as holder:
        port = holder.getsockname()[1]
        if is_held:
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        else:
            holder.close()
        yield port


def _bind(host: str, port: int) -> socket.socket:
    """A socket that shares its port with no other.

    If connections of an earlier service are still closing, it shares the port with sockets that
    have the same option (SO_REUSEADDR).
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
    """Host and port as in a URL, where an IPv6 address is in brackets."""
    return f"[{host}]:{port}" if _is_ipv6(host) else f"{host}:{port}"


def _is_ipv6(host: str) -> bool:
    """Whether Serve would use IPv6 for this host; it takes names for IPv4."""
    try:
        return ipaddress.ip_address(host).version == 6
    except ValueError:
        return False

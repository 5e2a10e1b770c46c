"""Where a server listens and who may come in: one rule for the REST API and for the page. Needs no torch."""

import ipaddress
import os
import socket

from dsl.schema import SettingsError

KEY = "DSL_API_KEY"  # the environment variable that holds the key


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def key_for(host: str, published: str | None = None) -> str | None:
    """The key of the environment, which is asked for; without one SettingsError, unless only this machine comes in.

    `published` is the address under which a container engine shows a port that listens on `host` inside.
    """
    key = os.environ.get(KEY) or None
    if key is None and not _loopback(published or host):
        raise SettingsError(f"host={published or host!r} can be reached from elsewhere: set a key in {KEY}")
    return key


def in_url(host: str) -> str:
    """A host as a URL wants it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises OSError in one sentence, SettingsError for what is no port."""
    if not 0 <= port <= 65535:
        raise SettingsError(f"--port must be from 0 to 65535, got {port}")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}; try another --port") from None

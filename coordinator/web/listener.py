"""The TCP socket at which a page is served."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from lutetia.system.errors import ConfigError, UnreachableError


def bind(address: str) -> socket.socket:
    """Listen on `host:port`.

    Raises:
        ConfigError: `address` is malformed.
        UnreachableError: the port is in use, or the host is not an address of this machine.
    """
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname or "127.0.0.1", parts.port or 0
    except ValueError as error:
        raise ConfigError(f"the HTTP address {address} has no port between 0 and 65535; correct it") from error
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        reason = (error.strerror or str(error)).lower()
        raise UnreachableError(f"cannot serve HTTP on {address}: {reason}; choose another port or stop its user") from error
    return listener


def page_address(listener: socket.socket) -> str:
    """The address of the status page, as this machine's browser opens it."""
    host, port = listener.getsockname()[:2]
    here = "127.0.0.1" if host == "0.0.0.0" else "::1" if host == "::" else host
    return f"http://[{here}]:{port}" if ":" in here else f"http://{here}:{port}"

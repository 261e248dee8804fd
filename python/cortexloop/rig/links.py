"""What a program of this package drives a session through: `request(message, buffer)`, whatever carries it.

`cortexloop.rig.server.LocalLink` is another link, within the process of a server.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from cortexloop.realtime.messages import Error, Reply, Request
from cortexloop.rig.client import RigClient, RigError, RigTimeout
from cortexloop.rig.protocol import Bytes


class Link(Protocol):
    """Any way to a session."""

    def request(self, request: Request, buffer: Bytes | None = None) -> tuple[Reply, bytes | memoryview | None]:
        """The reply, which may be an `Error`, and its buffer.

        Raises:
            TimeoutError: no reply came.
        """
        ...


class ClientLink:
    """A `RigClient` as a link: structures of `cortexloop.realtime.messages` instead of dicts.

    Args:
        client: says hello by itself; its heartbeat, retries and secret are its own business.
    """

    def __init__(self, client: RigClient) -> None:
        self.client = client

    def request(self, request: Request, buffer: Bytes | None = None) -> tuple[Reply, bytes | memoryview | None]:
        """See `Link`."""
        header = {name: value for name, value in msgspec.to_builtins(request).items() if value is not None}
        try:
            reply, data = self.client.request(header, b"" if buffer is None else buffer)
        except RigTimeout as error:
            raise TimeoutError(error.text) from error
        except RigError as error:
            code: Any = error.code
            return Error(id=request.id, code=code, text=error.text, retry=error.retry), None
        found: Reply = msgspec.convert(reply, Reply)
        return found, data or None

"""The other process of `cortexloop.rig.selftest`: serves one session after the other.

    python -m cortexloop.rig.selftest_server FOLDER CONFIG...

For each configuration: a new session in FOLDER/<position>, one line of JSON on stdout that says where it is served, and
then a line on stdin that ends it. The end of stdin ends everything.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cortexloop.rig.server import Server


def main(arguments: list[str]) -> None:
    """Serve the sessions of these configurations."""
    from cortexloop.realtime.session import Session
    from cortexloop.rig.config import build, load
    from cortexloop.rig.server import Server

    folder, *configs = (Path(argument) for argument in arguments)
    for position, path in enumerate(configs):
        config = load(path)
        sources, references = build(config)
        with Session.create(
            folder / str(position), config.settings, sources, references, config=config.kept
        ) as session:
            serving: Any = session
            server = Server(serving, zmq="tcp://127.0.0.1:*", tcp="127.0.0.1:0")
            where = {"zmq": server.zmq_address, "tcp": server.tcp_address}
            print(json.dumps(where), flush=True)
            waits = threading.Thread(target=_stop_at_line, args=(server,), daemon=True)
            waits.start()
            server.run()
            waits.join()
        if _over:
            return


_over: list[bool] = []
"""Filled when stdin has ended."""


def _stop_at_line(server: Server) -> None:
    if not sys.stdin.readline():
        _over.append(True)
    server.stop()


if __name__ == "__main__":
    main(sys.argv[1:])

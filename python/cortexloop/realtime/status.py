"""What a session says of itself: its status, and the machine it runs on."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from cortexloop.realtime import messages as m
from cortexloop.realtime.timing import latest_uncertainty_ns

if TYPE_CHECKING:
    from cortexloop.realtime.session import Session


def environment() -> dict[str, Any]:
    """Versions and machine, for the journal."""
    try:
        version = importlib.metadata.version("cortexloop")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        version = "source"
    return {
        "cortexloop": version,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "host": socket.gethostname(),
        "command": sys.argv[:20],
    }


@dataclass(eq=False)
class Client:
    """Whoever said hello, and when it was last heard by the session's monotonic clock."""

    name: str
    roles: list[Literal["display", "acquisition", "viewer"]]
    heard_ns: int
    lost: bool = False


def report(session: Session, id: str) -> m.StatusReply:
    """The answer to a `StatusRequest`."""
    now, known = session.now_ns(), session.known
    uncertainty = latest_uncertainty_ns(known.clocks.values(), now)
    try:
        free: int | None = shutil.disk_usage(session.folder).free
    except OSError:
        free = None
    return m.StatusReply(
        id=id,
        session=session.settings.session,
        state=known.state,
        text=known.text,
        streams=[
            m.StreamStatus(
                name=stream.name,
                generation=len(stream.rounds) - len(stream.proposals),
                best=stream.best[0][0] if stream.best else None,
                mean=stream.mean,
                finished=stream.finished,
                ready=any(not batch.served for current in stream.open for batch in current.batches),
            )
            for stream in known.streams.values()
        ],
        reference_mean=known.reference_mean,
        open_batches=[batch.made.batch_id for batch in known.open_batches()],
        batches=len(known.batches),
        told=known.counts["told"],
        deadline_misses=known.counts["deadline_misses"],
        reshown=known.counts["reshown"],
        late=known.counts["late"],
        gaps=known.counts["gaps"],
        clock_uncertainty_us=None if uncertainty is None else uncertainty / 1e3,
        links=[
            m.Link(
                client=client.name,
                roles=list(client.roles),
                last_heard_s=(now - client.heard_ns) / 1e9,
                stale=(now - client.heard_ns) / 1e9 >= session.settings.stale_after_s,
            )
            for client in session.clients.values()
        ],
        disk_free_bytes=free,
        last_sync_ms=session.last_sync_ms,
    )

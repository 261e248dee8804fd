"""What a session says of itself: its status, and the machine it runs on."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import socket
import sys
from typing import TYPE_CHECKING, Any

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


def report(session: Session, id: str) -> m.StatusReply:
    """The answer to a `StatusRequest`."""
    now = session.now_ns()
    state = session.state
    text = {
        "fault": session.fault or "",
        "paused": session.why_paused() if state == "paused" else "",
        "finished": "every stream has shown and learned all it had" if not session.stopped else "stopped",
    }.get(state, "")
    stale = session.settings.stale_after_s
    uncertainty = latest_uncertainty_ns(session.clocks.values(), now)
    try:
        free: int | None = shutil.disk_usage(session.folder).free
    except OSError:
        free = None
    return m.StatusReply(
        id=id,
        session=session.settings.session,
        state=state,
        text=text,
        streams=[
            m.StreamStatus(
                name=stream.name,
                generation=sum(x.learned for x in stream.rounds),
                best=stream.best,
                mean=stream.mean,
                finished=stream.finished,
                ready=any(not batch.served for x in stream.open for batch in x.batches),
            )
            for stream in session.streams.values()
        ],
        reference_mean=session.reference_mean,
        open_batches=[
            b.made.batch_id
            for b in session.batches
            if b.made.batch_kind != "filler" and not b.closed and not b.complete
        ],
        batches=len(session.batches),
        told=session.counts["told"],
        deadline_misses=session.counts["deadline_misses"],
        reshown=session.counts["reshown"],
        late=session.counts["late"],
        gaps=session.counts["gaps"],
        clock_uncertainty_us=None if uncertainty is None else uncertainty / 1e3,
        links=[
            m.Link(
                client=client.name,
                roles=client.roles,
                last_heard_s=(now - client.heard_ns) / 1e9,
                stale=(now - client.heard_ns) / 1e9 >= stale,
            )
            for client in session.clients.values()
        ],
        disk_free_bytes=free,
        last_sync_ms=session.last_sync_ms,
    )

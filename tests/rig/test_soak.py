"""Eight hours of a session at an accelerated clock: neither memory nor file descriptors grow."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from cortexloop.realtime import Session, SessionSettings, StreamSettings
from cortexloop.realtime import messages as m
from cortexloop.realtime.clock import ManualClock
from cortexloop.realtime.jobs import Immediately
from cortexloop.realtime.sources import FixedImages
from cortexloop.rig.inprocess import Loop

HOURS, BATCH_SECONDS = 8, 8.0


def resident_bytes() -> int:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_eight_hours_leave_memory_and_descriptors_flat(tmp_path: Path):
    memory = Path("/dev/shm")
    folder = tmp_path if not os.access(memory, os.W_OK) else memory / f"cortexloop-soak-{os.getpid()}"
    pictures = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    batches = int(HOURS * 3600 / BATCH_SECONDS)
    source = FixedImages(pictures[8:], per_batch=32, rounds=batches + 2)
    clock = ManualClock()
    settings = SessionSettings(session="soak", streams=[StreamSettings(name="set")], stale_after_s=60)
    measured: list[tuple[int, int]] = []
    try:
        with Session.create(
            folder, settings, {"set": source}, pictures[:8], clock=clock, executor=Immediately()
        ) as session:
            loop = Loop(session)
            after = None
            exchange = 0
            for number in range(batches):
                batch, images = loop.ask(after)
                clock.advance(BATCH_SECONDS)
                loop.shown(
                    [m.Event(pres_id=pres, t_on=clock.monotonic_ns(), clock="display") for pres in batch.pres_ids]
                )
                values = images.reshape(len(images), -1).mean(1)
                status = ["missing" if number % 50 == 0 and i == 9 else "ok" for i in range(len(values))]
                loop.tell(batch, values, status=status, final=True)
                if number % 2:
                    exchange += 1
                    now = clock.monotonic_ns()
                    loop.request(
                        m.ClockReport(
                            id=f"c{exchange}", clock="display", exchanges=[(now, now, now + 1000, now + 2000)]
                        )
                    )
                after = batch.batch_id
                if number in (batches // 4, batches - 1):
                    gc.collect()
                    measured.append((resident_bytes(), len(os.listdir("/proc/self/fd"))))
            status_now = session.status()
            assert status_now.told > batches * 39
            assert status_now.reshown > 0
        (early, descriptors), (late, descriptors_late) = measured
        assert descriptors_late == descriptors
        # Ids of requests are kept, so that none counts twice however late it comes: about 1 KB for each batch.
        assert late - early < 12e6, f"{(late - early) / 1e6:.1f} MB more after {HOURS} hours than after a quarter"
    finally:
        if folder != tmp_path:
            for file in folder.glob("*"):
                file.unlink()
            folder.rmdir()

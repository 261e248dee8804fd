"""A display in PsychoPy: shows what a session asks for, and reports when each image was on the screen.

    cortexloop serve psychopy_zmq.toml          on the server
    python psychopy_rig.py                      on the rig, beside a copy of client.py

Spikes are counted elsewhere; `count_spikes` is where they come in. If another program tells them to the session, leave
`rig.tell` out here.
"""

from __future__ import annotations

try:
    from client import RigClient  # a copy of cortexloop/rig/client.py
except ImportError:
    from cortexloop.rig.client import RigClient

import numpy as np
from psychopy import core, event, visual

ADDRESS, SECRET = "tcp://127.0.0.1:5557", None
FRAMES_ON, FRAMES_OFF = 6, 6  # 100 ms each at 60 Hz
SIZE_PIXELS = 300
UNITS = ["u1"]
SYNC_EVERY_S = 5.0


def count_spikes(onsets):
    """Responses [presentations, units] to images that came on at these times of PsychoPy's clock, NaN = missing."""
    raise NotImplementedError("ask your recording system here")


def main(count=count_spikes):
    """Show batches until the session is over, or somebody presses Escape."""
    window = visual.Window(fullscr=True, units="pix", color=(0, 0, 0))
    fixation = visual.Circle(window, radius=4, fillColor="red")
    pool = []  # textures are made in the gaps between batches, never between two frames
    synced = -SYNC_EVERY_S
    # A thread of the client sends signs of life meanwhile.
    with RigClient(ADDRESS, "psychopy", secret=SECRET, clock_ns=lambda: round(core.getTime() * 1e9)) as rig:
        for batch in rig.batches():
            if core.getTime() - synced >= SYNC_EVERY_S:
                rig.sync_clock("psychopy")
                synced = core.getTime()
            started = core.getTime()
            while len(pool) < len(batch.items):
                pool.append(visual.ImageStim(window, size=SIZE_PIXELS))
            for stimulus, image in zip(pool, batch.images):  # noqa: B905 - the pool may be longer
                stimulus.image = np.flipud(image) / 127.5 - 1  # PsychoPy's levels are -1..1, its first row is below
            print(f"{batch!r}: textures took {1e3 * (core.getTime() - started):.0f} ms")
            onsets, events = show(window, fixation, pool, batch)
            rig.shown(events)
            if events[-1]["outcome"] == "abort":
                rig.pause("Escape was pressed")
                break
            responses = np.asarray(count(onsets), np.float64)
            missing = ~np.isfinite(responses).all(axis=1)
            status = ["missing" if lost else "ok" for lost in missing]
            rig.tell(batch, responses, units=UNITS, status=status, window_ms=(50, 200), final=True)
    window.close()


def show(window, fixation, pool, batch):
    """Show the presentations of a batch; their onsets, and the events to report."""
    onsets, events = [], []
    aborted = False
    for index, pres_id in zip(batch.order, batch.pres_ids):  # noqa: B905 - also before Python 3.10
        if aborted or event.getKeys(["escape"]):
            aborted = True
            events.append({"pres_id": pres_id, "outcome": "abort"})
            continue
        dropped = window.nDroppedFrames
        times = []
        for frame in range(FRAMES_ON):
            pool[index].draw()
            fixation.draw()
            if frame == 0:
                window.callOnFlip(lambda: times.append(core.getTime()))  # noqa: B023 - called by the next flip
            window.flip()
        for frame in range(FRAMES_OFF):
            fixation.draw()
            if frame == 0:
                window.callOnFlip(lambda: times.append(core.getTime()))  # noqa: B023
            window.flip()
        missed = int(window.nDroppedFrames - dropped)
        onsets.append(times[0])
        events.append(
            {
                "pres_id": pres_id,
                "t_on": times[0],
                "t_off": times[1],
                "clock": "psychopy",
                "missed": missed,
                "outcome": "ok" if missed == 0 else "late_flip",
            }
        )
    return onsets, events


if __name__ == "__main__":
    main()

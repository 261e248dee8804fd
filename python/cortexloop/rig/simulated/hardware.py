"""Simulated display and acquisition: frames, light and photodiode; samples, buffers and their messages."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from cortexloop.rig.simulated.days import Day
from cortexloop.rig.simulated.neurons import Spikes
from cortexloop.rig.simulated.world import RigClock

SAMPLE_RATE = 30_000
BUFFER_MS = 10.0
DELAY_MS = 20.0
"""From the end of a buffer until its messages come: what Open Ephys needs."""


@dataclass(frozen=True)
class Shown:
    """One presentation. True times in nanoseconds; flip_s by the display's clock."""

    frame: int
    flip_s: float
    off_s: float
    flip_ns: int
    light_on_ns: int
    light_off_ns: int
    missed: int
    too_long: bool


class Display:
    """Flips at the frames of its own clock. Times are true ones if nothing else is said.

    Args:
        clock: the display's.
        day: refresh rate, and how reliable it is.
        rng: random numbers.
    """

    def __init__(self, clock: RigClock, day: Day, rng: np.random.Generator) -> None:
        self.clock, self._day, self._rng = clock, day, rng
        self.frame_ns = 1e9 / day.refresh_hz

    def plan(self, t_ns: int, on_ms: float) -> Shown:
        """An image that is shown for so long, at the next frame from t on."""
        reading = self.clock.read_ns(t_ns)
        frame = int(-(-reading // self.frame_ns))
        missed, too_long = 0, False
        if self._rng.random() < self._day.missed_flips:
            if self._rng.random() < 0.5:
                missed = 1
                frame += 1
            else:
                too_long = True
        frames = max(1, round(on_ms * 1e6 / self.frame_ns)) + too_long
        flip, off = round(frame * self.frame_ns), round((frame + frames) * self.frame_ns)
        light = max(0.1, self._rng.normal(self._day.light_ms, self._day.light_jitter_ms))
        flip_ns, off_ns = self.clock.true_ns(flip), self.clock.true_ns(off)
        return Shown(
            frame=frame,
            flip_s=flip / 1e9,
            off_s=off / 1e9,
            flip_ns=flip_ns,
            light_on_ns=flip_ns + round(light * 1e6),
            light_off_ns=off_ns + round(light * 1e6),
            missed=missed,
            too_long=too_long,
        )


class Acquisition:
    """Samples spikes by a clock of its own, and sends them in buffers as the messages of Open Ephys' ZMQ Interface.

    Args:
        t_ns: true time at which it is started.
        units: names of the electrodes.
        day: its clock, and how many messages get lost.
        rng: random numbers.
    """

    def __init__(self, t_ns: int, units: list[str], day: Day, rng: np.random.Generator) -> None:
        self._units, self._day, self._rng = units, day, rng
        self.lost = 0
        """Messages that got lost."""
        self._start(t_ns)

    def _start(self, t_ns: int) -> None:
        self.clock = RigClock(t_ns, self._day.acquisition_ppm)
        self.fired: dict[str, list[int]] = {unit: [] for unit in self._units}
        """Samples of all spikes since the start, in no order: the truth."""
        self._number = 0
        self._to_come: list[tuple[int, int]] = []  # sample and unit, not in a buffer yet
        self._buffers = 0
        self._on_the_way: list[tuple[int, list[list[bytes]]]] = []

    def restart(self, t_ns: int) -> None:
        """The program is started again: samples and message numbers begin anew, what was on its way is lost."""
        self._start(t_ns)

    def sample(self, t_ns: int) -> int:
        """The sample at a true time."""
        return self.clock.read_ns(t_ns) * SAMPLE_RATE // 1_000_000_000

    def fire(self, spikes: Spikes) -> None:
        """Spikes at true times; those of images that go on into the future come when it is their time."""
        for unit, times in enumerate(spikes):
            samples = [self.sample(t) for t in times.tolist() if t >= self.clock.zero_ns]
            self.fired[self._units[unit]] += samples
            self._to_come += [(sample, unit) for sample in samples]

    def arrived(self, t_ns: int) -> list[list[bytes]]:
        """Messages that have come by now."""
        length = round(BUFFER_MS * SAMPLE_RATE / 1e3)
        while self.sample(t_ns) >= (self._buffers + 1) * length:
            begin = self._buffers * length
            self._buffers += 1
            delay_ms = DELAY_MS
            if self._day.late_packets_ms and self._rng.random() < 0.05:
                delay_ms += self._rng.uniform(0, self._day.late_packets_ms)
            due = self.clock.true_ns((begin + length) * 1_000_000_000 // SAMPLE_RATE) + round(delay_ms * 1e6)
            if self._on_the_way:
                due = max(due, self._on_the_way[-1][0])  # one connection: nothing overtakes
            self._on_the_way.append((due, self._messages(begin, length)))
        here = [messages for due, messages in self._on_the_way if due <= t_ns]
        self._on_the_way = self._on_the_way[len(here) :]
        return [message for messages in here for message in messages]

    def next_ns(self) -> int:
        """When the next messages come, at the latest."""
        if self._on_the_way:
            return self._on_the_way[0][0]
        length = round(BUFFER_MS * SAMPLE_RATE / 1e3)
        return self.clock.true_ns((self._buffers + 1) * length * 1_000_000_000 // SAMPLE_RATE + 1_000)

    def _messages(self, begin: int, length: int) -> list[list[bytes]]:
        """Of one buffer: how far data has come, then its spikes."""
        end = begin + length
        spikes = sorted(spike for spike in self._to_come if spike[0] < end)
        self._to_come = [spike for spike in self._to_come if spike[0] >= end]
        content = {"stream": "simulated", "channel_num": 0, "num_samples": length, "sample_num": begin,
                   "sample_rate": float(SAMPLE_RATE)}  # fmt: skip
        found = [self._message(b"DATA", "data", "content", content)]
        for sample, unit in spikes:
            spike = {"stream": "simulated", "source_node": 100, "electrode": self._units[unit], "sample_num": sample,
                     "num_channels": 1, "num_samples": 40, "sorted_id": 0, "threshold": [0.0]}  # fmt: skip
            found.append(self._message(b"SPIKE", "spike", "spike", spike))
        return [message for message in found if not self._loses()]

    def _message(self, envelope: bytes, kind: str, part: str, content: dict[str, object]) -> list[bytes]:
        self._number += 1
        header = {"message_num": self._number, "type": kind, part: content, "data_size": 0, "timestamp": 0}
        return [envelope, json.dumps(header).encode(), b""]

    def _loses(self) -> bool:
        lost = self._rng.random() < self._day.lost_packets
        self.lost += lost
        return bool(lost)

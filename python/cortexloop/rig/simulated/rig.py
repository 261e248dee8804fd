"""The simulated rig's program: shows batches, counts spikes, tells responses, and lives through mishaps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cortexloop.realtime import messages as m
from cortexloop.realtime.timing import ClockEstimator, bursts_needed
from cortexloop.rig.counting import Counted, Presentation, SpikeCounter
from cortexloop.rig.open_ephys import Receiver
from cortexloop.rig.simulated.days import Day
from cortexloop.rig.simulated.hardware import SAMPLE_RATE, Acquisition, Display
from cortexloop.rig.simulated.neurons import Neurons
from cortexloop.rig.simulated.report import Acknowledged, DayReport, GenerationRow, Scores
from cortexloop.rig.simulated.world import Line, RigClock, World

T = TypeVar("T", bound=m.Reply)

CLOCK_UNITS = {"display": 1e9, "acquisition": 1e9 / SAMPLE_RATE}
"""Nanoseconds per unit of the rig's clocks, for the session's settings: seconds, and samples."""

_MS = 1_000_000
_ATTEMPTS = 20
_MAX_UNCERTAINTY_NS = 5_000_000  # of an onset that is still counted
_PATIENCE_NS = 3_000_000_000  # for spikes of a batch; what is not counted by then is missing


class RefusedError(RuntimeError):
    """The session refused what a rig in order does not ask for; or it is in a fault."""


class SimulatedRig:
    """One rig, display and acquisition in one program.

    Args:
        line: to the session.
        world: its time.
        neurons: that look at the display.
        day: timing and mishaps.
        seed: of everything random here.
        window_ms, guard_ms: of the counting window and the acquisition's buffers.
        score_units: for each stream, the units that make its score; only for the report.
        name: the client's.
        prefix: of message ids; another one for each run against the same session.
        on_generation: called when a generation is told.
    """

    def __init__(
        self,
        line: Line,
        world: World,
        neurons: Neurons,
        day: Day,
        *,
        seed: int = 0,
        window_ms: m.Window = (50.0, 200.0),
        guard_ms: float = 30.0,
        score_units: Mapping[str, Sequence[str]] | None = None,
        name: str = "simulated-rig",
        prefix: str = "rig",
        on_generation: Callable[[GenerationRow], None] | None = None,
    ) -> None:
        self.report = DayReport()
        self.acknowledged: list[Acknowledged] = []
        self.light_ns: dict[tuple[str, float], int] = {}
        """When light came on, by presentation and flip time, for those that counted."""
        self._line, self._world, self._neurons, self._day = line, world, neurons, day
        self._window, self._guard = window_ms, guard_ms
        self._name, self._on_generation = name, on_generation
        self._rng = np.random.default_rng([seed, 3])
        start = world.now_ns()
        self._clock = RigClock(start - 12_345_678_901, day.display_ppm)
        self._display = Display(self._clock, day, self._rng)
        self._acquisition = Acquisition(start, neurons.units, day, self._rng)
        self._scores = Scores(neurons.units, score_units or {})
        self._ids = (f"{prefix}-{number}" for number in itertools.count())
        self._idle_ns = start
        self._last_sync: int | None = None
        self._last_word = start
        self._drives: dict[str, NDArray[np.float64]] = {}
        self._open: tuple[str, int] | None = None
        self._begin()

    def _begin(self) -> None:
        """What the program knows when it is started: nothing."""
        self._counter = SpikeCounter(self._neurons.units, window_ms=self._window, guard_ms=self._guard)
        self._receiver = Receiver(self._counter, SAMPLE_RATE, on_restart=self._restarted)
        self._clocks = {name: ClockEstimator(name) for name in CLOCK_UNITS}
        self._lost: list[Presentation] = []
        self._unsure: list[tuple[m.Event, str]] = []

    def _restarted(self, lost: list[Any]) -> None:
        self._lost += lost
        self._clocks["acquisition"] = ClockEstimator("acquisition")
        self._last_sync = None

    # ------------------------------------------------------------------------------------------ the day

    def run(self, batches: int | None = None) -> DayReport:
        """Show batches until the session is finished, or so many are shown.

        Raises:
            RefusedError: the session does not work as it should.
        """
        start = self._world.now_ns()
        self._hello()
        after: str | None = None
        for number in itertools.count(1):
            if batches is not None and number > batches:
                break
            found = self._ask(after)
            if found is None:
                break
            batch, images = found
            self._generation_of(batch)
            restart = _now(number, self._day.client_restart_every)
            after = batch.batch_id if self._show(batch, images, crash=restart) else None
            self._mishaps(number)
        self._generation_of(None)
        reply = self._request(m.StatusRequest(id=self._id()), m.StatusReply)
        self.report.generations = list(self._scores.rows())
        self.report.session_s = (self._world.now_ns() - start) / 1e9
        self.report.packets_lost += self._acquisition.lost
        self.report.late_spikes += self._counter.late
        self.report.status = reply
        return self.report

    def _mishaps(self, number: int) -> None:
        """Between batches."""
        day = self._day
        if _now(number, day.clock_step_every):
            self.report.clock_steps += 1
            sign = 1 if self.report.clock_steps % 2 else -1
            self._clock.step(sign * round(day.clock_step_ms * _MS))
        if _now(number, day.acquisition_restart_every):
            self.report.acquisition_restarts += 1
            self._acquisition.restart(self._world.now_ns())
            self._idle_ns = self._world.now_ns()
        if _now(number, day.silence_every):
            self.report.silences += 1
            self._world.until(self._world.now_ns() + round(day.silence_s * 1e9))
        self._neurons.gain = 1 + day.gain_drift * float(np.sin(number / 10))

    def _generation_of(self, batch: m.Batch | None) -> None:
        """Report the generation before, when another begins."""
        if batch is not None and (batch.stream is None or batch.kind != "gen"):
            return
        current = None if batch is None or batch.stream is None else (batch.stream, batch.generation)
        if self._open is not None and self._open != current and self._on_generation is not None:
            self._on_generation(self._scores.row(*self._open))
        self._open = current

    # ------------------------------------------------------------------------------------------ messages

    def _id(self) -> str:
        return next(self._ids)

    def _send(self, request: m.Request, buffer: bytes | None = None) -> tuple[m.Reply, bytes | memoryview | None]:
        """The reply to a request, which is sent again under the same id while none comes."""
        self.report.requests += 1
        for _ in range(_ATTEMPTS):
            try:
                reply, raw = self._line.request(request, buffer)
            except TimeoutError:
                self.report.resent += 1
                continue
            self._last_word = self._world.now_ns()
            if isinstance(reply, m.Error) and reply.code == "NO_HELLO" and not isinstance(request, m.Hello):
                self._greet()
                self._last_sync = None  # another server, which has not heard of the clocks yet
                continue
            return reply, raw
        raise RefusedError(f"no answer to a {type(request).__name__.lower()} that was sent {_ATTEMPTS} times")

    def _request(self, request: m.Request, kind: type[T], buffer: bytes | None = None) -> T:
        reply, _ = self._send(request, buffer)
        if not isinstance(reply, kind):
            said = f"{reply.code}: {reply.text}" if isinstance(reply, m.Error) else type(reply).__name__
            raise RefusedError(f"the session answered a {type(request).__name__.lower()} with {said}")
        return reply

    def _greet(self) -> None:
        self._line.connect(self._name)
        self._request(m.Hello(id=self._id(), client=self._name, roles=["display", "acquisition"]), m.Welcome)

    def _hello(self) -> None:
        self._greet()
        self._last_sync = None
        self._sync()

    def _sync(self) -> None:
        """Relate the rig's clocks to the session's, by a burst of exchanges."""
        exchanges: dict[str, list[tuple[int, int, int, int]]] = {name: [] for name in self._clocks}
        clocks = {"display": self._clock, "acquisition": self._acquisition.clock}
        for _ in range(6):
            sent = {name: clock.read_ns(self._world.now_ns()) for name, clock in clocks.items()}
            reply = self._request(m.ClockRequest(id=self._id(), t1_ns=sent["display"]), m.ClockReply)
            for name, clock in clocks.items():
                back = clock.read_ns(self._world.now_ns())
                exchanges[name].append((sent[name], reply.t2_ns, reply.t3_ns, back))
        for name, burst in exchanges.items():
            self._clocks[name].add(burst)
            self._request(m.ClockReport(id=self._id(), clock=name, exchanges=burst), m.Ack)
        self._last_sync = self._world.now_ns()

    def _keep_in_touch(self) -> None:
        """A sign of life each second, clocks every five."""
        now = self._world.now_ns()
        if bursts_needed(self._last_sync, now):
            self._sync()
        elif now - self._last_word >= 1_000_000_000:
            self._request(m.Heartbeat(id=self._id()), m.Ack)

    def _ask(self, after: str | None) -> tuple[m.Batch, NDArray[np.uint8]] | None:
        """The next batch and its images; None when the session is over."""
        # While nothing is shown yet, there is nothing to keep up with.
        within_ms = 10_000.0 if after is None else None
        for _ in range(10 * _ATTEMPTS):
            reply, raw = self._send(m.Ask(id=self._id(), after=after, within_ms=within_ms))
            if isinstance(reply, m.Batch):
                assert raw is not None
                self.report.batches[reply.kind] = self.report.batches.get(reply.kind, 0) + 1
                return reply, np.frombuffer(raw, np.uint8).reshape(reply.shape)
            assert isinstance(reply, m.Error)
            if reply.code == "FINISHED":
                return None
            if reply.code == "PAUSED":
                self.report.resumed += 1
                self._request(m.Resume(id=self._id()), m.Ack)
            elif not reply.retry:
                raise RefusedError(f"the session answered an ask with {reply.code}: {reply.text}")
            self._wait_ms(100.0)
        raise RefusedError(f"the session had no batch for {10 * _ATTEMPTS} asks")

    # ------------------------------------------------------------------------------------------ presentations

    def _wait_ms(self, milliseconds: float) -> None:
        self._world.until(self._world.now_ns() + round(milliseconds * _MS))
        self._listen()

    def _listen(self) -> None:
        """Take what the acquisition has sent by now."""
        now = self._world.now_ns()
        ahead = now + 50 * _MS
        self._acquisition.fire(self._neurons.idle(self._idle_ns, ahead, self._rng))
        self._idle_ns = ahead
        for message in self._acquisition.arrived(now):
            self._receiver.take(message)

    def _drive(self, batch: m.Batch, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Evoked rates [items, units]; references are looked at once."""
        new = [i for i, item in enumerate(batch.items) if item.sha not in self._drives]
        if new:
            found = self._neurons.drive(np.ascontiguousarray(images[new]))
            self._drives |= {batch.items[i].sha: row for i, row in zip(new, found, strict=True)}
        rates = np.stack([self._drives[item.sha] for item in batch.items])
        self._drives = {item.sha: rates[i] for i, item in enumerate(batch.items)}
        return rates

    def _show(self, batch: m.Batch, images: NDArray[np.uint8], *, crash: bool) -> bool:
        """Show a batch and tell its responses; False if the program crashed on the way."""
        rates = self._drive(batch, images)
        trials = range(0, len(batch.order), self._day.trial_images)
        for number, first in enumerate(trials):
            part = range(first, min(first + self._day.trial_images, len(batch.order)))
            self._trial(batch, part, rates)
            if crash and number == len(trials) // 2:
                self.report.client_restarts += 1
                self.report.late_spikes += self._counter.late
                self._begin()
                self._wait_ms(1500.0)
                self._hello()
                return False
            self._tell(batch)
            self._keep_in_touch()
            if first != trials[-1]:
                self._wait_ms(self._day.pause_ms)
        patience = self._world.now_ns() + _PATIENCE_NS
        while self._counter.pending and self._world.now_ns() < patience:
            self._wait_ms(10.0)
        self._tell(batch, final=True)
        return True

    def _trial(self, batch: m.Batch, part: range, rates: NDArray[np.float64]) -> None:
        """Show presentations one after the other until fixation is lost."""
        day = self._day
        events: list[m.Event] = []
        broken = False
        for position in part:
            pres_id, index = batch.pres_ids[position], batch.order[position]
            if broken:
                events.append(m.Event(pres_id=pres_id, outcome="not_shown"))
                continue
            shown = self._display.plan(self._world.now_ns(), day.on_ms)
            broken = self._rng.random() < day.breaks
            off_ns = shown.light_off_ns
            if broken:
                off_ns = shown.light_on_ns + round((off_ns - shown.light_on_ns) * self._rng.random())
            spikes = self._neurons.evoke(rates[index], shown.light_on_ns, off_ns, self._rng)
            self._acquisition.fire(spikes)
            self._world.until(off_ns)
            outcome: m.Outcome = "no_fix" if broken else "late_flip" if shown.too_long else "ok"
            diode = self._acquisition.sample(shown.light_on_ns) if self._rng.random() >= day.no_diode else None
            event = m.Event(
                pres_id=pres_id,
                outcome=outcome,
                t_on=shown.flip_s,
                t_off=shown.off_s,
                clock="display",
                frame=shown.frame,
                missed=shown.missed,
                diode=diode,
                acquisition=None if diode is None else "acquisition",
            )
            events.append(event)
            if outcome == "ok":
                self.light_ns[pres_id, shown.flip_s] = shown.light_on_ns
                item_id = batch.items[index].item_id
                if diode is None:
                    self._unsure.append((event, item_id))
                else:
                    self._counter.presented(pres_id, item_id, self._receiver.ns(diode))
            self._wait_ms(day.off_ms)
            self._keep_in_touch()
        for event in events:
            if event.outcome != "ok":
                self._scores.discard(batch, event.pres_id)
            self.report.presentations[event.outcome] = self.report.presentations.get(event.outcome, 0) + 1
        if self._unsure:
            self._sync()  # a step of the display's clock has to be known before its flip times are believed
        self._request(m.Shown(id=self._id(), events=events), m.Ack)
        self._place_by_flips()

    def _place_by_flips(self) -> None:
        """Onsets without a photodiode: by flip time, after a burst of exchanges."""
        if not self._unsure:
            return
        now = self._world.now_ns()
        acquisition = self._clocks["acquisition"].mapping
        assert acquisition is not None
        for event, item_id in self._unsure:
            assert event.t_on is not None
            server, uncertainty = self._clocks["display"].to_server_ns(round(event.t_on * 1e9), now)
            light = server + round(self._day.light_ms * _MS)
            onset = acquisition.to_client_ns(light)
            if uncertainty + acquisition.uncertainty_at(onset) > _MAX_UNCERTAINTY_NS:
                self.report.unsure += 1
                self._lost.append(Presentation(event.pres_id, item_id, onset))
            else:
                self._counter.presented(event.pres_id, item_id, onset)
        self._unsure = []

    # ------------------------------------------------------------------------------------------ responses

    def _tell(self, batch: m.Batch, *, final: bool = False) -> None:
        """Tell what has been counted; with `final`, also that nothing more will come."""
        self._listen()
        counted = self._counter.ready()
        self._check(counted)
        rows = _with_lost(counted, self._lost)
        self._lost = []
        if not len(rows) and not final:
            return
        message, buffer = rows.tell(self._id(), batch.batch_id, final=final)
        reply, _ = self._send(message, buffer)
        if not isinstance(reply, m.Ack):
            assert isinstance(reply, m.Error)
            raise RefusedError(f"the session answered a tell with {reply.code}: {reply.text}")
        items = {item.item_id: item for item in batch.items}
        known = {one.item_id for one in reply.ignored}
        for presentation, status, row in zip(rows.presentations, rows.status, rows.responses, strict=True):
            if presentation.item_id in known:
                continue  # had a response before the program crashed
            self.report.responses[status] = self.report.responses.get(status, 0) + 1
            self.acknowledged.append(Acknowledged(batch.batch_id, presentation.pres_id, status, row))
            if status == "ok":
                self._scores.add(batch, items[presentation.item_id], presentation.pres_id, row)

    def _check(self, counted: Counted) -> None:
        """Compare with what was fired: by the acquisition's own samples, however they were sent."""
        begin, end = (round(edge * _MS) for edge in self._window)
        seconds = (end - begin) / 1e9
        trains = [_ns(self._acquisition.fired[unit]) for unit in counted.units]
        for presentation, status, row in zip(counted.presentations, counted.status, counted.responses, strict=True):
            if status != "ok":
                continue
            on = presentation.t_on_ns
            truth = [((train >= on + begin) & (train < on + end)).sum() / seconds for train in trains]
            self.report.wrong += not np.allclose(row, truth, rtol=1e-6)
        oldest = self._acquisition.sample(self._world.now_ns()) - 10 * SAMPLE_RATE
        for train in self._acquisition.fired.values():
            train[:] = [sample for sample in train if sample >= oldest]


def _ns(samples: Sequence[int]) -> NDArray[np.int64]:
    """Nanoseconds of sample numbers, as `Receiver.ns` has them."""
    whole, rest = np.divmod(np.asarray(samples, np.int64), SAMPLE_RATE)
    return np.asarray(whole * 1_000_000_000 + np.rint(rest * 1e9 / SAMPLE_RATE).astype(np.int64))


def _now(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


def _with_lost(counted: Counted, lost: Sequence[Presentation]) -> Counted:
    """Rows for presentations that cannot be counted any more."""
    if not lost:
        return counted
    gaps: list[m.Status] = ["gap" for _ in lost]
    nothing = np.full((len(lost), len(counted.units)), np.nan, np.float32)
    return Counted(
        [*counted.presentations, *lost],
        counted.units,
        np.concatenate([counted.responses, nothing]),
        [*counted.status, *gaps],
        counted.kind,
        counted.window_ms,
        counted.baseline_ms,
    )

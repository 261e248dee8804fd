"""Sessions under everything at once: messages in any order, twice, late or lost, crashes, pauses, work that takes its
time.

A presentation's fate is a function of its name and its image alone. So whatever happens on the way, the batches have to
be the same to the bit as those of a session in which nothing happens, and so do the sources in the end.
"""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from sessions import SIZE, evolution, identity, pictures

from cortexloop.realtime import Session, SessionSettings, StreamSettings
from cortexloop.realtime import messages as m
from cortexloop.realtime import records as r
from cortexloop.realtime.clock import ManualClock
from cortexloop.realtime.journal import JOURNAL, scan
from cortexloop.realtime.sources import FixedImages
from cortexloop.rig.history import History

T = TypeVar("T")
WITHIN_MS = 100.0
ALLOWED = {"PAUSED", "FINISHED", "STALE_BATCH"}


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk() -> Iterator[None]:
    """A crash here is that of a process: what was handed to the system stays."""
    with pytest.MonkeyPatch.context() as patched:
        for module in ("journal", "pixels"):
            patched.setattr(f"cortexloop.realtime.{module}.sync_file", lambda fd: None)
        yield


class Later(Executor):
    """Does the work when it is told to: jobs are under way for as long as a test wants."""

    def __init__(self) -> None:
        self.todo: list[Callable[[], None]] = []

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self.todo.append(work)
        return future

    def work(self, at: int = 0) -> None:
        if self.todo:
            self.todo.pop(at % len(self.todo))()


class World:
    """A session in a folder, and a rig that may do anything.

    Args:
        seed: of the sources, and of what becomes of the presentations.
        streams: two or three.
    """

    def __init__(self, folder: Path, seed: int, streams: int) -> None:
        self.folder, self.seed = folder, seed
        names = ["evo", "set", "other"][:streams]
        self.settings = SessionSettings(
            session="test",
            streams=[StreamSettings(name=name) for name in names],
            seed=seed,
            repeats=1 + seed % 2,
            within_ms=WITHIN_MS,
            max_reshow=1,
            min_fraction=0.75,
            filler="best" if seed % 3 == 0 else "references",
        )
        self.references = pictures(seed % 2 + 1, 99)
        self.clock = ManualClock()
        self.batches: dict[str, m.Batch] = {}
        self.images: dict[str, np.ndarray[Any, Any]] = {}
        self.after: str | None = None
        self.crashes = self.number = 0
        self.asked: list[m.Ask] = []
        self.sent: list[tuple[m.Request, bytes | None]] = []
        self.answered: set[str] = set()
        self.session = self._open(Session.create)

    def _open(self, how: Callable[..., Session]) -> Session:
        self.executor = Later()
        sources: dict[str, Any] = {
            "evo": evolution(self.seed, 3, population=4),
            "set": FixedImages(pictures(5, self.seed), per_batch=2, seed=self.seed),
            "other": FixedImages(pictures(3, self.seed + 1), per_batch=2, rounds=2),
        }
        sources = {stream.name: sources[stream.name] for stream in self.settings.streams}
        session = how(self.folder, self.settings, sources, self.references, clock=self.clock, executor=self.executor)
        session.handle("rig", m.Hello(id=self.id(), client="rig"))
        return session

    def id(self) -> str:
        self.number += 1
        return f"m{self.number}"

    # -------------------------------------------------------------------------------------- what becomes of images

    def fate(self, pres_id: str) -> str:
        """Most are well; the third showing of an image always."""
        chance = zlib.crc32(f"{self.seed} {pres_id}".encode()) % 100
        if pres_id.rpartition(".")[0].endswith(("-r2", "-r3", "-r4", "-r5")) or chance < 65:
            return "ok"
        return "no_fix" if chance < 75 else "missing" if chance < 90 else "gap"

    def rows(self, batch: m.Batch, presentations: list[str], garbage: bool = False) -> tuple[m.Tell, bytes]:
        of = dict(zip(batch.pres_ids, batch.order, strict=True))
        image = self.images[batch.batch_id].astype(np.float64)
        values = np.array([[image[of[p]].mean(), image[of[p]].std() + len(p)] for p in presentations]).reshape(-1, 2)
        fates = [self.fate(pres) for pres in presentations]
        status: list[Any] = ["ok" if fate == "ok" else "artifact" if fate == "no_fix" else fate for fate in fates]
        values[[s != "ok" for s in status]] = np.nan
        tell = m.Tell(
            id=self.id(), batch_id=batch.batch_id, item_ids=[batch.items[of[p]].item_id for p in presentations],
            pres_ids=presentations, units=["u", "v"], dtype="float64", status=status,
        )  # fmt: skip
        return tell, (values * (-3 if garbage else 1)).astype("<f8").tobytes()

    # -------------------------------------------------------------------------------------- messages

    def send(self, request: m.Request, buffer: bytes | None = None) -> m.Reply | None:
        """A request that changes something, or an ask."""
        reply = self.session.handle("rig", request, buffer)
        return None if reply is None else self.receive(*reply)

    def receive(self, reply: m.Reply, buffer: Any) -> m.Reply:
        if isinstance(reply, m.Error):
            retry = reply.code == "BUSY" and "no references" in reply.text
            assert reply.code in ALLOWED or retry, reply
        if isinstance(reply, m.Batch):
            images = np.frombuffer(buffer, np.uint8).reshape(-1, SIZE, SIZE, 3)
            known = self.batches.setdefault(reply.batch_id, reply)
            assert identity(known) == identity(reply)
            np.testing.assert_array_equal(self.images.setdefault(reply.batch_id, images), images)
            if self.after is None or self.number_of(reply.batch_id) > self.number_of(self.after):
                self.after = reply.batch_id
        return reply

    def number_of(self, batch_id: str) -> int:
        return self.session.known.by_id[batch_id].number if batch_id in self.session.known.by_id else -1

    def poll(self) -> list[m.Reply]:
        return [self.receive(*out) for _, out in self.session.poll()]

    def record(self, request: m.Request, buffer: bytes | None = None) -> m.Reply:
        """Send, and keep it for being sent again."""
        reply = self.send(request, buffer)
        assert reply is not None
        self.sent.append((request, buffer))
        if isinstance(reply, m.Ack):
            self.answered.add(request.id)
        return reply

    def crash(self) -> None:
        """The process is gone, and with it what was not synced."""
        self.session._journal._pending.clear()
        self.session._journal.close()
        self.session._pixels.close()
        self.crashes += 1
        self.session = self._open(Session.resume)

    def close(self) -> None:
        self.session.close()

    # -------------------------------------------------------------------------------------- what a rig may do

    def step(self, what: str, a: int, b: int) -> None:
        batches = list(self.batches.values())
        batch = batches[-1 - a % min(len(batches), 4)] if batches else None
        match what:
            case "ask":
                ask = m.Ask(id=self.id(), after=None if a % 3 == 0 else self.after, within_ms=None if b % 2 else 0.0)
                self.asked.append(ask)
                self.send(ask)
            case "ask again":
                if self.asked:
                    self.send(self.asked[-1 - a % min(len(self.asked), 3)])
            case "tell" if batch is not None:
                count = len(batch.pres_ids)
                chosen = sorted({(a + k * (1 + b % 3)) % count for k in range(1 + b % count)}, key=lambda k: k * b % 7)
                self.record(*self.rows(batch, [batch.pres_ids[k] for k in chosen]))
            case "tell final" if batch is not None:  # what is not told of is missing
                tell, buffer = self.rows(batch, batch.pres_ids[a % len(batch.pres_ids) :])
                self.record(msgspec.structs.replace(tell, final=True), buffer)
            case "tell all" if batch is not None:
                self.record(*self.rows(batch, batch.pres_ids))
            case "tell garbage" if batch is not None:  # of presentations that are told of
                told = self.session.known.by_id[batch.batch_id]
                again = [p for p in batch.pres_ids if told.closed or p in told.told]
                if again:
                    reply = self.record(*self.rows(batch, again, garbage=True))
                    assert isinstance(reply, m.Ack)
                    assert reply.accepted == 0
            case "shown" if batch is not None:
                chosen = batch.pres_ids[a % len(batch.pres_ids) :][: 1 + b % 4]
                events = [m.Event(pres_id=p, outcome="no_fix" if self.fate(p) == "no_fix" else "ok") for p in chosen]
                self.record(m.Shown(id=self.id(), events=events))
            case "abort" if batch is not None:  # also of what was told as well
                self.record(m.Shown(id=self.id(), events=[m.Event(pres_id=batch.pres_ids[a % len(batch.pres_ids)],
                                                                 outcome="abort")]))  # fmt: skip
            case "send again":
                if self.sent:
                    request, buffer = self.sent[-1 - a % min(len(self.sent), 9)]
                    reply = self.send(request, buffer)
                    if request.id in self.answered:  # acknowledged once, acknowledged for ever
                        assert isinstance(reply, m.Ack)
                        assert reply.dup
            case "pause":
                self.record(m.Pause(id=self.id(), reason="a break"))
            case "resume":
                self.record(m.Resume(id=self.id()))
            case "wait":
                self.clock.advance(a * 0.02)
                self.poll()
            case "poll":
                self.poll()
            case "work":
                self.executor.work(a)
            case "crash":
                self.crash()

    def finish(self) -> None:
        """A diligent client goes on to the end."""
        for _ in range(300):
            while self.executor.todo:
                self.executor.work()
            self.poll()
            reply = self.send(m.Ask(id=self.id(), within_ms=0.0))
            if isinstance(reply, m.Error) and reply.code == "FINISHED":
                return
            if isinstance(reply, m.Error):
                self.record(m.Resume(id=self.id()))
            elif isinstance(reply, m.Batch):
                self.record(*self.rows(reply, reply.pres_ids))
        raise AssertionError(f"it does not end: {self.session.status()}")

    # -------------------------------------------------------------------------------------- what has to hold

    def made(self) -> dict[str, Any]:
        """Every batch but the fillers, as recorded."""
        return {
            x.batch_id: (x.items, x.shas, x.order, x.pres_ids)
            for x in scan(self.folder / JOURNAL).records()
            if isinstance(x, r.BatchMade) and x.batch_kind != "filler"
        }

    def digests(self) -> dict[str, str]:
        return {name: stream.source.digest() for name, stream in self.session.known.streams.items()}

    def updates(self) -> dict[str, Any]:
        return {x.batch_id: x.scores for x in scan(self.folder / JOURNAL).records() if isinstance(x, r.Update)}

    def check_counted_once(self) -> None:
        """Scores are means of the first response to each presentation that was not aborted in time."""
        history = History.of(scan(self.folder / JOURNAL).records())
        for name, scores in self.updates().items():
            batch = history.batches[name]
            parts = history.round(batch)
            gen = [item.item_id for item in batch.made.items if item.kind == "gen"]
            found = []
            for item in gen:
                values = [v for part in parts if item in part.state.presentations for v in history.of_item(part, item)]
                assert len(values) <= self.settings.repeats
                found.append(np.mean(values) if values else np.nan)
            np.testing.assert_allclose(found, scores.numpy())

    def check_replay(self) -> None:
        """From the records alone: the same state."""
        before, counts = self.digests(), dict(self.session.known.counts)
        self.close()
        self.session = self._open(Session.resume)
        assert self.digests() == before
        assert self.session.known.counts == counts


@cache
def undisturbed(seed: int, streams: int) -> tuple[Any, Any, Any]:
    """What comes of a session in which nothing happens: batches, scores, sources."""
    folder = tempfile.mkdtemp()
    try:
        world = World(Path(folder), seed, streams)
        world.finish()
        found = world.made(), world.updates(), world.digests()
        world.close()
    finally:
        shutil.rmtree(folder)
    return found


def disturbed(seed: int, streams: int, steps: list[tuple[str, int, int]], check: Callable[[World], None]) -> None:
    folder = tempfile.mkdtemp()
    try:
        world = World(Path(folder), seed, streams)
        try:
            for what, a, b in steps:
                note(f"{what} {a} {b}")
                world.step(what, a, b)
            world.finish()
            world.check_counted_once()
            check(world)
            world.check_replay()
            world.finish()
        finally:
            world.close()
    finally:
        shutil.rmtree(folder)


GENTLE = (
    "ask", "ask", "ask again", "tell", "tell", "tell all", "tell all", "tell garbage", "shown", "send again", "pause",
    "resume", "wait", "poll", "work", "work", "crash",
)  # fmt: skip


def steps(kinds: tuple[str, ...]) -> st.SearchStrategy[list[tuple[str, int, int]]]:
    return st.lists(st.tuples(st.sampled_from(kinds), st.integers(0, 20), st.integers(0, 20)), min_size=50, max_size=90)


LIMITS = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck), derandomize=True)


@LIMITS
@given(st.integers(0, 5), st.integers(2, 3), steps(GENTLE))
def test_whatever_happens_the_batches_are_the_same(seed: int, streams: int, steps: list[tuple[str, int, int]]):
    def check(world: World) -> None:
        batches, scores, digests = undisturbed(seed, streams)
        assert world.made() == batches
        assert world.updates() == scores
        assert world.digests() == digests

    disturbed(seed, streams, steps, check)


@LIMITS
@given(st.integers(0, 5), st.integers(2, 3), steps((*GENTLE, "abort", "abort", "tell final")))
def test_presentations_may_be_given_up_at_any_time(seed: int, streams: int, steps: list[tuple[str, int, int]]):
    disturbed(seed, streams, steps, lambda world: None)

"""How fast a session answers on this computer, or over this network: measured through the protocol that rigs use.

Without an address, a server is started as a process of its own, with sessions that show given images, evolve images,
and choose among candidates by a model. Their journals are on the disk that is to be tested, as acknowledgements wait
for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cortexloop.rig.client import Batch, RigClient, RigError

IMAGES = 32
UNITS = 64


@dataclass(frozen=True)
class Measured:
    """One thing that was measured, n times. loop: whether a display would wait for it."""

    name: str
    milliseconds: list[float]
    loop: bool = False

    def percentile(self, percent: float) -> float:
        """The value that so many percent do not exceed: one that was measured."""
        return float(np.percentile(self.milliseconds, percent, method="higher"))

    def summary(self) -> dict[str, float]:
        """n, p50, p99, p99.9, max."""
        return {
            "n": len(self.milliseconds),
            "p50": self.percentile(50),
            "p99": self.percentile(99),
            "p99.9": self.percentile(99.9),
            "max": max(self.milliseconds),
        }


@dataclass
class SelfTest:
    """All that was measured, in milliseconds.

    Attributes:
        rows: one for each thing.
        deadline_ms: when a batch has to be there after it is asked for.
        where: what was measured: an address, or this computer.
        notes: what to know about the numbers.
    """

    deadline_ms: float
    where: str
    rows: list[Measured] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def kept(self) -> tuple[int, int]:
        """Waits of a display that ended by the deadline, and all."""
        waits = [value for row in self.rows if row.loop for value in row.milliseconds]
        return sum(value <= self.deadline_ms for value in waits), len(waits)

    @property
    def ok(self) -> bool:
        """Whether no more than one in a hundred waits, of each kind, was longer than the deadline."""
        return all(row.percentile(99) <= self.deadline_ms for row in self.rows if row.loop)


def selftest(
    folder: Path,
    *,
    config: Path | None = None,
    n: int = 200,
    batches: int = 20,
    deadline_ms: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> SelfTest:
    """Measure with a server on this computer.

    Args:
        folder: empty, on the disk where sessions are to be kept. What is written there can be removed afterwards.
        config: a session's configuration, whose sources are measured instead; the session itself is not touched.
        n: repetitions of what is short.
        batches: of what takes a batch.
        deadline_ms: the configuration's, or 150, if None.
        progress: called with what comes next.

    Raises:
        ValueError: a configuration that cannot be used, or n or batches below 1.
        RuntimeError: the server does not start.
    """
    if n < 1 or batches < 1:
        raise ValueError(f"n and batches should be at least 1, got {n} and {batches}")
    say = progress or (lambda _: None)
    deadline, units = 150.0, _units()
    if config is not None:
        from cortexloop.rig.config import load

        settings = load(config).settings
        deadline = settings.within_ms
        units = sorted({unit for stream in settings.streams for unit in stream.units}) or units
    found = SelfTest(deadline_ms=deadline if deadline_ms is None else deadline_ms, where="this computer")
    if config is None:
        say("making images")
        configs = _examples(folder, n, batches)
    else:
        configs = [config]
    with _server(folder, configs) as starting:
        if config is not None:
            say("the configuration's session")
            where = starting()
            found.rows += _link(where["zmq"], "ZeroMQ", n)
            found.rows += _link(where["tcp"], "plain TCP", n)
            found.rows += _rounds(where["zmq"], "next batch after the last response", batches, 1, units)
            return found
        say("messages, images, responses")
        where = starting()
        found.rows += _link(where["zmq"], "ZeroMQ", n)
        found.rows += _link(where["tcp"], "plain TCP", n)
        found.rows += _tells(where["zmq"], n)
        found.rows += _rounds(where["zmq"], "next batch: images that were ready", batches, 1)
        say("an evolution")
        what = f"next batch: CMA-ES step, {IMAGES} images generated"
        found.rows += [row for row in _rounds(starting()["zmq"], what, batches, 1) if row.loop]
        say("candidates scored by a model")
        what = f"next batch: {IMAGES} candidates scored by a model"
        found.rows += [row for row in _rounds(starting()["zmq"], what, batches, 2) if row.loop]
    return found


def selftest_of(address: str, *, secret: str | None = None, n: int = 200, deadline_ms: float = 150.0) -> SelfTest:
    """Measure over the network, without telling the session anything: messages, and the images of its current batch.

    Raises:
        RigError: the server cannot be reached, or refuses.
        ValueError: n below 1, or an address that is none.
    """
    if n < 1:
        raise ValueError(f"n should be at least 1, got {n}")
    found = SelfTest(deadline_ms=deadline_ms, where=address)
    found.rows += _link(address, address.partition(":")[0], n, secret)
    if len(found.rows) == 1:
        found.notes.append("the session has no batch to show now; images were not measured")
    return found


# ---------------------------------------------------------------------------------------------- measuring


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result


def _client(address: str, secret: str | None = None) -> RigClient:
    return RigClient(address, f"selftest-{os.getpid()}", secret=secret, heartbeat=None, timeout=10.0, retries=3)


def _link(address: str, over: str, n: int, secret: str | None = None) -> list[Measured]:
    """Round trips, and the same batch again and again: it is the current one until it is told."""
    with _client(address, secret) as client:
        client.hello()
        beats = [_timed(client.heartbeat)[0] for _ in range(n + 5)][5:]
        rows = [Measured(f"round trip, {over}", beats)]
        try:
            batch = client.ask(within_ms=60_000)
        except RigError as error:
            if error.code in ("PAUSED", "FINISHED", "BUSY"):
                return rows
            raise
        asks = [_timed(client.ask)[0] for _ in range(n)]
        megabytes = len(batch.pixels) / 1e6
        count, height, width, _ = batch.shape
        rows.append(Measured(f"{count} images {height} x {width} ({megabytes:.1f} MB), {over}", asks))
    return rows


def _units() -> list[str]:
    return [f"u{unit}" for unit in range(UNITS)]


def _tells(address: str, n: int) -> list[Measured]:
    """One response after the other, as they come during a trial."""
    rng = np.random.default_rng(0)
    tells: list[float] = []
    syncs: list[float] = []
    after: Batch | None = None
    with _client(address) as client:
        while len(tells) < n:
            after = batch = client.ask(after, within_ms=60_000)
            for pres_id in batch.pres_ids:
                row = rng.poisson(20.0, (1, UNITS)).astype(np.float32)
                tells.append(_timed(partial(client.tell, batch, row, units=_units(), pres_ids=[pres_id]))[0])
                syncs.append(float(client.status()["last_sync_ms"] or 0.0))
    return [
        Measured(f"a response of {UNITS} units: told, on disk, acknowledged", tells),
        Measured("of that, the disk (fdatasync)", syncs),
    ]


def _rounds(address: str, what: str, batches: int, depth: int, units: Sequence[str] | None = None) -> list[Measured]:
    """From the last response of the oldest batch to the next batch, with so many batches out at a time.

    With as many out as the source proposes at a time, nothing is prepared beforehand, and all its work is waited for.
    """
    units = _units() if units is None else units
    rng = np.random.default_rng(0)
    waits: list[float] = []
    tells: list[float] = []
    with _client(address) as client:
        out = [client.ask(within_ms=60_000)]
        while len(out) < depth:
            out.append(client.ask(out[-1], within_ms=60_000))
        for _ in range(batches):
            batch = out.pop(0)
            responses = rng.poisson(20.0, (len(batch.pres_ids), len(units))).astype(np.float32)
            milliseconds, _ = _timed(partial(client.tell, batch, responses, units=units))
            tells.append(milliseconds)
            try:
                wait, following = _timed(partial(client.ask, out[-1] if out else batch, within_ms=60_000))
            except RigError as error:
                if error.code == "FINISHED":
                    break
                raise
            waits.append(wait)
            out.append(following)
    rows = [Measured(f"responses of a batch, {len(units)} units: told, on disk, acknowledged", tells)]
    return [*rows, Measured(what, waits, loop=True)] if waits else rows


# ---------------------------------------------------------------------------------------------- the server


def _examples(folder: Path, n: int, batches: int) -> list[Path]:
    """Configurations of the sessions that are measured, and the images that they need."""
    from cortexloop.textbook import SIZE, procedural_images

    candidates = procedural_images((batches + 4) * IMAGES)
    np.save(folder / "candidates.npy", candidates)
    np.save(folder / "images.npy", candidates[: 2 * IMAGES])
    rounds = -(-n // IMAGES) + batches + 4
    streams = {
        "images": f'kind = "images"\nimages = "images.npy"\nper_batch = {IMAGES}\nrounds = {rounds}\n',
        "evolution": 'kind = "evolution"\noptimiser = "cholesky-cma"\ngenerator = "fourier"\n'
        f"population = {IMAGES}\nsize = [{SIZE}, {SIZE}]\n",
        "screen": f'kind = "screen"\nimages = "candidates.npy"\nmodels = "textbook"\nneurons = ["curve_up"]\n'
        f"per_batch = {IMAGES}\nchunk = {IMAGES}\nbudget_ms = 1.0\n",
    }
    paths = []
    for name, stream in streams.items():
        path = folder / f"{name}.toml"
        session = f'[session]\nname = "selftest-{name}"\nfolder = "sessions/{name}"\n\n'
        path.write_text(f'{session}[[streams]]\nname = "{name}"\n{stream}', encoding="utf-8")
        paths.append(path)
    return paths


@contextlib.contextmanager
def _server(folder: Path, configs: Sequence[Path]) -> Iterator[Callable[[], dict[str, str]]]:
    """A server in another process. Each call of what this gives ends the session before and returns the next address.

    Raises:
        RuntimeError: it does not start; the message is the last line it wrote.
    """
    log = folder / "server.log"
    command = [sys.executable, "-m", "cortexloop.rig.selftest_server", str(folder), *map(str, configs)]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
        )
    assert process.stdin is not None
    assert process.stdout is not None
    started = [False]

    def starting() -> dict[str, str]:
        assert process.stdin is not None
        assert process.stdout is not None
        if started[0]:
            process.stdin.write("next\n")
            process.stdin.flush()
        started[0] = True
        line = process.stdout.readline()
        if not line:
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise RuntimeError(f"the server of the self-test did not start: {said[-1] if said else 'it said nothing'}")
        where: dict[str, str] = json.loads(line)
        where["tcp"] = "tcp-raw://" + where["tcp"].removeprefix("tcp://")
        return where

    try:
        yield starting
    finally:
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

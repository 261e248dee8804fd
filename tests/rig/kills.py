"""Kill server and client of sessions at random moments, and compare with sessions that nobody killed.

    python tests/rig/kills.py --kills 1000 --sessions 20

Processes are forked from this one, which has imported everything and computed nothing: so a restart takes as long as
the replay of the journal, and a thousand of them some minutes. POSIX only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cortexloop.evolve import CholeskyCMA, FourierGenerator
from cortexloop.realtime import Session, SessionSettings, StreamSettings
from cortexloop.realtime import records as r
from cortexloop.realtime.journal import JOURNAL, scan
from cortexloop.realtime.sources import EvolutionSource, FixedImages
from cortexloop.rig.client import RigClient, RigError
from cortexloop.rig.server import Server

SIZE, GENERATIONS = 12, 10
SETTINGS = SessionSettings(
    session="killed",
    streams=[StreamSettings(name="evo"), StreamSettings(name="set")],
    repeats=2,
    within_ms=600_000,
    max_reshow=2,
    min_fraction=0.3,
)


def parts(seed: int) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """Sources and references of session `seed`."""
    rng = np.random.default_rng(seed)
    generator = FourierGenerator(SIZE, SIZE)
    optimiser = CholeskyCMA(generator.dim, population=6, seed=seed)
    pictures = rng.integers(0, 256, (22, SIZE, SIZE, 3), dtype=np.uint8)
    sources = {
        "evo": EvolutionSource(optimiser, generator, generations=GENERATIONS),
        "set": FixedImages(pictures[2:], per_batch=4, seed=seed),
    }
    return sources, pictures[:2]


def open_session(folder: Path, seed: int) -> Session:
    """Begin the session, or go on with it."""
    sources, references = parts(seed)
    begin = Session.resume if (folder / JOURNAL).exists() else Session.create
    return begin(folder, SETTINGS, sources, references)


def serve(folder: Path, address: str, seed: int) -> None:
    """Until killed."""
    torch.set_num_threads(1)
    session = open_session(folder, seed)
    Server(session, zmq=address).run()


def show(address: str) -> None:
    """Be the rig: show and tell until the session is over, each batch in two tells; some presentations fail."""
    with RigClient(address, "rig", timeout=0.3, retries=10_000, heartbeat=None) as rig:
        for batch in rig.batches():
            # What a presentation gives depends on its name and pixels only, so that it is the same after any restart.
            rows, status = [], []
            for pres, index in zip(batch.pres_ids, batch.order):  # noqa: B905 - lists of one reply
                rng = np.random.default_rng(list(pres.encode()))
                rows.append([float(np.asarray(batch.images[index]).mean()) + rng.standard_normal(), rng.random()])
                status.append("ok" if rng.random() < 0.9 else "missing")
            half = len(rows) // 2
            values = np.array(rows)
            with contextlib.suppress(RigError):  # told completely before this client was killed
                for chosen in (slice(half), slice(half, None)):
                    rig.tell(batch, values[chosen], units=["a", "b"], pres_ids=batch.pres_ids[chosen],
                             status=status[chosen])  # fmt: skip


def summary(folder: Path, seed: int) -> dict[str, Any]:
    """What a session was, from its journal: batches, what its sources became, how often each presentation counted."""
    records = list(scan(folder / JOURNAL).records())
    made = {x.batch_id: x for x in records if isinstance(x, r.BatchMade)}
    counted: Counter[str] = Counter()
    ids: Counter[str] = Counter()
    closed: set[str] = set()
    for record in records:
        if isinstance(record, r.Update):
            closed |= {x.batch_id for x in made.values() if record.batch_id in (x.batch_id, x.repairs)}
        if isinstance(record, r.Told):
            ids[record.header.id] += 1
            if record.header.batch_id not in closed:
                counted.update(set(record.header.pres_ids or ()))
    with open_session(folder, seed) as session:  # replays, and compares every digest
        while any(stream.job is not None for stream in session.known.streams.values()):
            session.poll()
        told = session.status().told
        digests = {name: stream.source.digest() for name, stream in session.known.streams.items()}
        state = session.state
    presentations = [pres for batch in made.values() for pres in batch.pres_ids]
    return {
        "batches": {name: [x.shas, x.order, x.pres_ids] for name, x in sorted(made.items())},
        "digests": digests,
        "accepted": told,
        "presentations": len(presentations),
        "untold": sorted(set(presentations) - set(counted)),
        "ids_twice": [id for id, count in ids.items() if count > 1],
        "state": state,
        "opened": sum(isinstance(x, r.Opened) for x in records) - 1,
        "torn": sum(x.torn_bytes > 0 for x in records if isinstance(x, r.Opened)),
    }


def fork(work: Callable[[], None]) -> int:
    """Do it in a process of its own; its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except KeyboardInterrupt:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def in_a_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a function returns in a process of its own, as this one must not compute anything."""
    with tempfile.NamedTemporaryFile() as file:
        path = Path(file.name)
        _, status = os.waitpid(fork(lambda: void(path.write_text(json.dumps(work())))), 0)
        if status:
            raise RuntimeError("a process failed; see above")
        result: dict[str, Any] = json.loads(path.read_text())
        return result


def void(_: object) -> None:
    """Drop a result."""


def ended(pid: int) -> int | None:
    """The exit status of a process, None while it runs."""
    got, status = os.waitpid(pid, os.WNOHANG)
    return None if got == 0 else status


def one_session(folder: Path, seed: int, kills: int) -> dict[str, int]:
    """Run a session, killing so many times; the kills there were.

    Raises:
        RuntimeError: server or client ended by themselves in another way than they should, or nothing moves any more.
    """
    rng = np.random.default_rng([seed, 99])
    address = f"ipc://{folder}/socket"
    work = {"server": lambda: serve(folder, address, seed), "client": lambda: show(address)}
    running = {name: fork(each) for name, each in work.items()}
    done = {"server": 0, "client": 0}
    last = time.monotonic()
    try:
        while True:
            time.sleep(float(rng.exponential(rng.choice([0.02, 0.25]))))
            status = ended(running["client"])
            if status == 0:
                return done
            if status is not None or ended(running["server"]) is not None:
                raise RuntimeError(f"session {seed}: a process failed; see above")
            if sum(done.values()) < kills:
                victim = "server" if rng.random() < 0.7 else "client"
                os.kill(running[victim], signal.SIGKILL)
                os.waitpid(running[victim], 0)
                done[victim] += 1
                running[victim] = fork(work[victim])
                last = time.monotonic()
            elif time.monotonic() - last > 60:
                raise RuntimeError(f"session {seed}: not finished a minute after the last kill")
    finally:
        for pid in running.values():
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def campaign(kills: int, sessions: int, seed: int = 0) -> dict[str, Any]:
    """Kill that often, in that many sessions; everything that differs from the uninterrupted sessions.

    A session that is over before its share of kills leaves it to more sessions.
    """
    found: dict[str, Any] = {"kills": 0, "server": 0, "client": 0, "sessions": 0, "restarts": 0, "torn": 0,
                             "batches": 0, "presentations": 0, "differences": []}  # fmt: skip
    number = seed
    while found["kills"] < kills:
        with tempfile.TemporaryDirectory(prefix="kills-") as parent:
            whole, killed = Path(parent) / "whole", Path(parent) / "killed"
            for folder in (whole, killed):
                folder.mkdir()
            one_session(whole, number, 0)
            done = one_session(killed, number, min(-(-kills // sessions), kills - found["kills"]))
            expected = in_a_child(lambda f=whole, n=number: summary(f, n))
            got = in_a_child(lambda f=killed, n=number: summary(f, n))
        for name in ("batches", "digests", "accepted", "presentations", "untold", "state"):
            if got[name] != expected[name]:
                found["differences"].append(f"session {number}: {name}: {expected[name]!r:.200} but {got[name]!r:.200}")
        if got["ids_twice"] or got["accepted"] != got["presentations"] or got["untold"] or got["state"] != "finished":
            found["differences"].append(f"session {number}: { ({**got, 'batches': ...})!r:.400}")
        for victim, count in done.items():
            found[victim] += count
            found["kills"] += count
        found["sessions"] += 1
        found["restarts"] += got["opened"]
        found["torn"] += got["torn"]
        found["batches"] += len(got["batches"])
        found["presentations"] += got["presentations"]
        number += 1
    return found


def main() -> int:
    """Print what was found; 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = campaign(arguments.kills, arguments.sessions, arguments.seed)
    print(json.dumps(found, indent=1))
    return bool(found["differences"])


if __name__ == "__main__":
    sys.exit(main())

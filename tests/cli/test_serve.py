"""`cortexloop serve`: begin, resume, refuse, and end in good order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortexloop.cli.app import run
from cortexloop.rig.client import RigClient

CONFIG = """
[session]
name = "served"
folder = "kept"
within_ms = 20000
stale_after_s = 600

[server]
zmq = "tcp://127.0.0.1:*"
tcp = "127.0.0.1:0"

[references]
images = "references.npy"

[[streams]]
name = "evolution"
kind = "evolution"
size = [12, 10]
dim = 20
population = 6
generations = 6
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    np.save(tmp_path / "references.npy", np.full((2, 12, 10, 3), 100, np.uint8))
    (tmp_path / "rig.toml").write_text(CONFIG)
    return tmp_path / "rig.toml"


class Served:
    """The command in a process of its own."""

    def __init__(self, config: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cortexloop", "serve", str(config), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.said: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if "(ZeroMQ)" in line:
                self.address = line.split()[2]
            if "(TCP)" in line:
                break
        else:
            raise AssertionError(self.process.stderr.read() if self.process.stderr else "")
        self._rest = threading.Thread(target=self._listen)
        self._rest.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        self.said.extend(self.process.stdout)

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        code = self.process.wait(20)
        self._rest.join()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        return code


def shown(rig: RigClient, count: int) -> Iterator[Any]:
    """Show and tell so many batches; the pixels of each."""
    for _ in range(count):
        batch = rig.ask()
        yield batch.pixels
        rig.tell(batch, batch.images[batch.order].mean(axis=(1, 2))[:, :1], units=["u"])


def test_a_session_survives_its_server(config: Path, tmp_path: Path):
    """Killed in the middle, resumed and finished; every image as without all that."""
    first = Served(config, "--new")
    assert "begun in" in first.said[0]
    with RigClient(first.address, heartbeat=None) as rig:
        pixels = list(shown(rig, 2))
        pending = rig.ask().pixels
    assert first.end(signal.SIGKILL) == -signal.SIGKILL

    second = Served(config, "--until-finished")
    assert "resumed from" in second.said[0]
    with RigClient(second.address, heartbeat=None) as rig:
        assert rig.ask().pixels == pending
        pixels += list(shown(rig, 4))
    assert second.process.wait(20) == 0
    second.end(signal.SIGTERM)
    assert any("finished" in line and "48 responses" in line for line in second.said)
    assert second.said[-1].startswith("closed; go on with: cortexloop serve")

    # The same without an interruption, in this process.
    (tmp_path / "kept").rename(tmp_path / "before")
    from cortexloop.rig.config import load
    from cortexloop.rig.inprocess import Loop
    from cortexloop.rig.serving import open_session

    session, resumed = open_session(load(config))
    assert not resumed
    with session:
        loop = Loop(session)
        for expected in pixels:
            batch, images = loop.ask(within_ms=20_000)
            assert images.tobytes() == expected
            rows = images[batch.order].mean(axis=(1, 2))[:, 0].astype(np.float32)
            loop.tell(batch, rows, pres_ids=batch.pres_ids, units=["u"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_good_order(
    config: Path, number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    before = signal.getsignal(number)
    monkeypatch.setattr("cortexloop.cli.rig.serve._tell_where", lambda *_: os.kill(os.getpid(), number))
    assert run(["serve", str(config)]) == 0
    assert capsys.readouterr().out.startswith("closed; go on with")
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("options", "change", "says"),
    [
        (["--new", "--resume"], ("", ""), "exclude each other"),
        (["--resume"], ("", ""), "has no session to resume"),
        ([], ('"evolution"\nsize', '"magic"\nsize'), "rig.toml: streams[0].kind"),
        ([], ("127.0.0.1:0", "0.0.0.0:0"), "set a secret"),
        ([], ("references.npy", "nothing.npy"), "nothing.npy"),
        ([], ("12, 10]", "12, 11]"), "references"),
    ],
)
def test_bad_input_is_one_sentence(
    config: Path, capsys: pytest.CaptureFixture[str], options: list[str], change: tuple[str, str], says: str
):
    config.write_text(CONFIG.replace(*change) if change[0] else CONFIG)
    assert run(["serve", str(config), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_another_configuration_does_not_resume(config: Path, capsys: pytest.CaptureFixture[str]):
    from cortexloop.rig.config import load
    from cortexloop.rig.serving import open_session

    open_session(load(config))[0].close()
    assert run(["serve", str(config), "--new"]) == 2
    assert "has a session; resume it" in capsys.readouterr().err
    config.write_text(CONFIG.replace("population = 6", "population = 8"))
    assert run(["serve", str(config)]) == 2
    assert "population" in capsys.readouterr().err
    config.write_text(CONFIG.replace('zmq = "tcp://127.0.0.1:*"', 'zmq = ""'))
    session, resumed = open_session(load(config))  # where it listens may change
    assert resumed
    # Another process is at work.
    assert run(["serve", str(config)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    session.close()


def test_folders_are_served_beside_the_network(config: Path, tmp_path: Path):
    from cortexloop.rig.config import load
    from cortexloop.rig.serving import Service, open_session

    config.write_text(CONFIG + '\n[exchange]\nimages = "shared/images"\nscores = "shared/scores"\n')
    found = load(config)
    service = Service(found, open_session(found)[0])
    thread = threading.Thread(target=service.run)
    thread.start()
    until = time.monotonic() + 20
    while not (tmp_path / "shared" / "images" / "block000_manifest.json").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    assert len(list((tmp_path / "shared" / "images").glob("block000_*.png"))) == 8
    service.stop()
    thread.join(20)
    assert not thread.is_alive()


def test_a_line_for_each_change(capsys: pytest.CaptureFixture[str]):
    from cortexloop.cli.rig.serve import _Line
    from cortexloop.realtime import messages as m

    def status(told: int, generation: int, mean: float | None, stale: bool = False) -> m.StatusReply:
        stream = m.StreamStatus(name="e", generation=generation, best=mean, mean=mean, finished=False, ready=True)
        return m.StatusReply(
            id="1", session="s", state="running", text="", streams=[stream], reference_mean=None, open_batches=[],
            batches=1, told=told, deadline_misses=0, reshown=2, late=0, gaps=0, clock_uncertainty_us=None,
            links=[m.Link(client="ptb", roles=[], last_heard_s=9.0, stale=stale)], disk_free_bytes=1, last_sync_ms=1.0,
        )  # fmt: skip

    tell = _Line()
    for state in (status(1, 0, None), status(2, 0, None), status(3, 1, 2.5), status(4, 1, 2.5, True)):
        tell(state)
    assert capsys.readouterr().out.splitlines() == [
        "running; e generation 0; 2 shown again; 1 responses",
        "running; e generation 1 mean 2.5 best 2.5; 2 shown again; 3 responses",
        "running; e generation 1 mean 2.5 best 2.5; 2 shown again; not heard: ptb; 4 responses",
    ]

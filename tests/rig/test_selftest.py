"""The self-test: that it measures what it says, not how long anything takes."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from cortexloop.cli.app import run
from cortexloop.realtime.session import Session
from cortexloop.rig import selftest as module
from cortexloop.rig.client import RigTimeout
from cortexloop.rig.selftest import Measured, SelfTest, selftest, selftest_of
from cortexloop.rig.server import Server
from cortexloop.rig.simulated import example


def test_percentiles_are_measured_values():
    row = Measured("x", [float(v) for v in range(1, 101)])
    assert row.summary() == {"n": 100, "p50": 51.0, "p99": 100.0, "p99.9": 100.0, "max": 100.0}


def test_verdict():
    found = SelfTest(deadline_ms=10.0, where="here", rows=[Measured("message", [99.0])])
    assert found.ok
    assert found.kept == (0, 0)
    found.rows.append(Measured("batch", [1.0] * 99 + [9.0], loop=True))
    assert found.ok
    found.rows.append(Measured("other batch", [1.0, 11.0], loop=True))
    assert not found.ok
    assert found.kept == (101, 102)


def test_a_server_in_another_process(tmp_path):
    said = []
    found = selftest(tmp_path, n=3, batches=2, deadline_ms=60_000, progress=said.append)
    counts = {row.name: len(row.milliseconds) for row in found.rows}
    assert counts == {
        "round trip, ZeroMQ": 3,
        "32 images 112 x 112 (1.2 MB), ZeroMQ": 3,
        "round trip, plain TCP": 3,
        "32 images 112 x 112 (1.2 MB), plain TCP": 3,
        "a response of 64 units: told, on disk, acknowledged": 32,
        "of that, the disk (fdatasync)": 32,
        "responses of a batch, 64 units: told, on disk, acknowledged": 2,
        "next batch: images that were ready": 2,
        "next batch: CMA-ES step, 32 images generated": 2,
        "next batch: 32 candidates scored by a model": 2,
    }
    assert all(value > 0 for row in found.rows for value in row.milliseconds)
    assert found.kept == (6, 6)
    assert len(said) == 4


def test_a_configuration_of_ones_own(tmp_path):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8))
    config = tmp_path / "session.toml"
    config.write_text(
        '[session]\nname = "mine"\nfolder = "mine"\nwithin_ms = 5000\n'
        '[[streams]]\nname = "s"\nkind = "images"\nimages = "images.npy"\nper_batch = 2\nunits = ["ch17"]\n'
    )
    (tmp_path / "work").mkdir()
    found = selftest(tmp_path / "work", config=config, n=2, batches=10)
    assert found.deadline_ms == 5000
    assert not (tmp_path / "mine").exists()
    last = found.rows[-1]
    assert last.name == "next batch after the last response"
    assert len(last.milliseconds) == 2  # three batches, then the session is over


def test_a_server_that_does_not_start(tmp_path):
    config = tmp_path / "session.toml"
    config.write_text(
        '[session]\nname = "mine"\nfolder = "mine"\n'
        '[[streams]]\nname = "s"\nkind = "images"\nimages = "nowhere.npy"\nper_batch = 2\n'
    )
    with pytest.raises(RuntimeError, match=r"did not start: .*nowhere\.npy"):
        selftest(tmp_path, config=config, n=1, batches=1)


@pytest.mark.parametrize("options", [{"n": 0}, {"batches": 0}])
def test_nothing_to_measure(tmp_path, options):
    with pytest.raises(ValueError, match="at least 1"):
        selftest(tmp_path, **options)


@pytest.fixture
def served(tmp_path):
    """A server in a thread, and its session."""
    settings, sources, references = example(generations=1, population=4, references=1)
    with Session.create(tmp_path / "s", settings, sources, references) as session:
        server = Server(session, zmq="tcp://127.0.0.1:*")
        thread = threading.Thread(target=server.run)
        thread.start()
        yield server, session
        server.stop()
        thread.join()


def test_a_running_server_is_told_nothing(served):
    server, session = served
    found = selftest_of(server.zmq_address, n=4)
    assert [len(row.milliseconds) for row in found.rows] == [4, 4]
    assert not found.notes
    assert session.status().told == 0


def test_command(served, tmp_path, capsys):
    server, _ = served
    assert run(["rig", "selftest", "--address", server.zmq_address, "-n", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert {name: row["n"] for name, row in found["milliseconds"].items()} == {
        "round trip, tcp": 2,
        "5 images 112 x 112 (0.2 MB), tcp": 2,
    }
    for arguments in (
        ["--address", "tcp://127.0.0.1:1", "--folder", "x"],
        ["--deadline-ms", "0"],
        ["--folder", str(tmp_path / "none")],
        ["--config", str(tmp_path / "none.toml")],
    ):
        assert run(["rig", "selftest", *arguments]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_no_server(monkeypatch):
    client = module._client

    def impatient(*arguments):
        found = client(*arguments)
        found.timeout, found.retries = 0.05, 1
        return found

    monkeypatch.setattr(module, "_client", impatient)
    with pytest.raises(RigTimeout):
        selftest_of("tcp://127.0.0.1:9", n=1)

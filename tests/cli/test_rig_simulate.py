"""`cortexloop rig simulate` as a user runs it."""

from __future__ import annotations

import contextlib
import io
import json
import threading

import numpy as np
import pytest

from cortexloop.cli.app import run
from cortexloop.realtime.session import Session
from cortexloop.rig.config import build, load
from cortexloop.rig.server import Server


def simulate(*arguments):
    """Run in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(["rig", "simulate", *(str(argument) for argument in arguments)])
    return code, out.getvalue(), err.getvalue()


def test_a_short_day(tmp_path):
    code, out, err = simulate("--generations", 1, "--folder", tmp_path / "s")
    assert (code, err) == (0, "")
    assert "evolution generation   0: mean" in out
    assert "responses lost" in out
    assert (tmp_path / "s" / "session.rigj").is_file()
    code, out, err = simulate("--generations", 1, "--folder", tmp_path / "s")
    assert (code, out) == (2, "")
    assert "has a session already; choose another --folder" in err


def test_json():
    code, out, _ = simulate("--generations", 1, "--day", "bad", "--neuron", "dot_small", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["ok"], found["lost"], found["wrong"]) == (True, 0, 0)
    assert found["status"]["state"] == "finished"


@pytest.fixture
def config(tmp_path):
    """Two batches of four images, scored by a unit that no textbook neuron is called after."""
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (8, 112, 112, 3), np.uint8))
    path = tmp_path / "session.toml"
    path.write_text(
        '[session]\nname = "mine"\nfolder = "mine"\nwithin_ms = 5000\n'
        '[[streams]]\nname = "fixed"\nkind = "images"\nimages = "images.npy"\nper_batch = 4\nunits = ["ch17"]\n'
    )
    return path


def test_a_configuration(config):
    code, out, err = simulate("--config", config)
    assert (code, err) == (0, "")
    assert "fixed generation   1: mean" in out
    assert not (config.parent / "mine").exists()


def test_a_server(config, tmp_path):
    found = load(config)
    sources, references = build(found)
    with Session.create(tmp_path / "s", found.settings, sources, references) as session:
        server = Server(session, zmq="tcp://127.0.0.1:*", secret="a long secret")
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            secret = tmp_path / "secret"
            secret.write_text("another secret\n")
            wrong = simulate("--address", server.zmq_address, "--config", config, "--secret-file", secret)
            secret.write_text("a long secret\n")
            right = simulate("--address", server.zmq_address, "--config", config, "--secret-file", secret, "--json")
        finally:
            server.stop()
            thread.join()
        assert wrong[0] == 2
        assert "the secret is missing or wrong" in wrong[2]
        assert right[0] == 0
        assert json.loads(right[1])["status"]["state"] == "finished"
        assert session.status().told == 8


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--day", "wet"], "--day should be one of good, bad, got 'wet'"),
        (["--generations", "0"], "--generations should be at least 1"),
        (["--neuron", "grandmother"], "--neuron should be one of"),
        (["--seed", "-1"], "--seed should be at least 0"),
        (["--address", "tcp://127.0.0.1:1", "--folder", "x"], "--folder goes without --address"),
        (["--models", "nowhere.npz"], "nowhere.npz"),
    ],
)
def test_what_cannot_be_used(arguments, text):
    code, out, err = simulate(*arguments)
    assert (code, out) == (2, "")
    assert text in err
    assert err.count("\n") == 1

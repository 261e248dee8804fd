"""`cortexloop rig simulate` as a user runs it."""

from __future__ import annotations

import contextlib
import io
import json

import pytest

from cortexloop.cli.app import run


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

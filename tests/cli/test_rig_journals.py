"""`cortexloop rig verify`, `recover`, `export` and `replay` as a user runs them."""

from __future__ import annotations

import contextlib
import io
import json

import pytest

from cortexloop.cli.app import run
from cortexloop.realtime import Session
from cortexloop.realtime.jobs import Immediately
from cortexloop.realtime.journal import JOURNAL
from cortexloop.realtime.records import Told
from cortexloop.rig.config import build, load
from cortexloop.rig.inprocess import Loop
from session_files import write_session


def cortexloop(*arguments):
    """Run in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def session(tmp_path):
    """(folder, records)"""
    return tmp_path / "session", write_session(tmp_path / "session")


def spoil(folder):
    """Damage in the middle."""
    data = bytearray((folder / JOURNAL).read_bytes())
    data[len(data) // 2] ^= 0xFF
    (folder / JOURNAL).write_bytes(data)


def test_verify(session):
    folder, records = session
    code, out, err = cortexloop("rig", "verify", folder)
    assert (code, err) == (0, "")
    assert "sound" in out
    assert "wrong" not in out
    code, out, _ = cortexloop("rig", "verify", folder, "--json")
    document = json.loads(out)
    assert (code, document["sound"]) == (0, True)
    assert document["checks"][0] == {
        "name": "journal", "looked": len(records), "wrong": 0, "problems": [], "notes": [],
    }  # fmt: skip


def test_verify_says_what_is_wrong(session):
    folder, _ = session
    spoil(folder)
    code, out, err = cortexloop("rig", "verify", folder)
    assert (code, err) == (1, "")
    assert "1 wrong" in out
    assert "is damaged" in out
    code, out, _ = cortexloop("rig", "verify", folder, "--json")
    assert (code, json.loads(out)["sound"]) == (1, False)


def test_recover_and_what_to_do_then(session, tmp_path):
    folder, records = session
    code, out, _ = cortexloop("rig", "recover", folder)
    assert code == 0
    assert "needs no recovery" in out
    spoil(folder)
    code, out, _ = cortexloop("rig", "export", folder, "--out", tmp_path / "out")
    assert code == 2
    code, out, err = cortexloop("rig", "recover", folder)
    assert (code, err) == (0, "")
    assert f"{JOURNAL}.recovered" in out
    assert f"{JOURNAL}.rescued" in out
    code, out, err = cortexloop("rig", "export", folder / f"{JOURNAL}.rescued", "--out", tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    assert str(tmp_path / "out" / "responses.csv") in json.loads(out)["files"]
    rows = (tmp_path / "out" / "responses.csv").read_text().splitlines()
    told = sum(isinstance(record, Told) for record in records)
    assert 2 * (told - 1) <= len(rows) - 1 <= 2 * told


@pytest.mark.parametrize("to", ["csv", "parquet", "xdream"])
def test_export(session, tmp_path, to):
    folder, _ = session
    code, out, err = cortexloop("rig", "export", folder, "--to", to, "--out", tmp_path / "a" / "b")
    assert (code, err) == (0, "")
    assert "codes.npz" in out
    assert len(list((tmp_path / "a" / "b").iterdir())) >= 9


def test_replay(session):
    folder, _ = session
    code, out, err = cortexloop("rig", "replay", folder)
    assert (code, err) == (0, "")
    assert "session 'monkey-1', 2023-11-14 22:13:20 UTC, streams: evo" in out
    assert "deadline_miss" in out
    assert "stream evo" in out
    assert "0:00.001" in out


CONFIG = """
[session]
name = "checked"
folder = "session"
seed = {seed}

[[streams]]
name = "evo"
kind = "evolution"
optimiser = "cholesky-cma"
generator = "fourier"
population = 4
generations = 2
size = [12, 12]
"""


def test_replay_check(tmp_path):
    """The configuration's sources do all of it again; other ones are found out."""
    path = tmp_path / "rig.toml"
    path.write_text(CONFIG.format(seed=1))
    config = load(path)
    sources, references = build(config)
    with Session.create(
        config.folder, config.settings, sources, references, config=config.kept, executor=Immediately()
    ) as session:
        loop = Loop(session)
        for _ in range(2):
            batch, images = loop.ask()
            loop.tell(batch, images.mean(axis=(1, 2, 3)))
        session.poll()
    code, out, err = cortexloop("rig", "replay", config.folder, "--check", path)
    assert (code, err) == (0, "")
    assert "2 batches, 2 generations learned" in out
    assert "8 images rendered again" in out
    (tmp_path / "other.toml").write_text(CONFIG.format(seed=2))
    code, out, err = cortexloop("rig", "replay", config.folder, "--check", tmp_path / "other.toml")
    assert (code, err) == (1, "")
    assert "does not repeat" in out
    assert "seed" in out
    code, out, err = cortexloop("rig", "replay", config.folder, "--check", tmp_path / "none.toml")
    assert code == 2
    assert "there is no configuration" in err


@pytest.mark.parametrize("command", ["verify", "recover", "export", "replay"])
def test_bad_input_is_told_in_one_sentence(tmp_path, command):
    code, out, err = cortexloop("rig", command, tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "no session" in err
    (tmp_path / JOURNAL).write_bytes(b"something else altogether")
    code, out, err = cortexloop("rig", command, tmp_path)
    if command == "verify":
        assert code == 1
        assert "is no journal" in out
    else:
        assert (code, out) == (2, "")
        assert "is no journal" in err


def test_an_unknown_format(session, tmp_path):
    code, _, err = cortexloop("rig", "export", session[0], "--to", "nwb", "--out", tmp_path / "out")
    assert code == 2
    assert "csv, images, parquet, xdream" in err

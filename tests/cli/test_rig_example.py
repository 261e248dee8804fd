"""`cortexloop rig example`: what it lists it writes, and nothing is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortexloop.cli.app import run
from cortexloop.rig.config import load


def test_examples_are_listed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["rig", "example"]) == 0
    names = capsys.readouterr().out.split()
    assert {"simulated.toml", "client.py"} <= set(names)
    for name in names:
        assert run(["rig", "example", name, "--out", str(tmp_path)]) == 0
        assert (tmp_path / name).stat().st_size > 100
    assert load(tmp_path / "simulated.toml").settings.session == "simulated"
    capsys.readouterr()
    assert run(["rig", "example", "client.py", "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_unknown_examples_are_refused(capsys: pytest.CaptureFixture[str]):
    assert run(["rig", "example", "nwb.toml"]) == 2
    assert "there is no example 'nwb.toml'; there are RigClient.m, client.py, " in capsys.readouterr().err

"""The example scripts run, with stand-ins for the programs that draw."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rig_parts import make_session, pictures, serving

import cortexloop.rig
from cortexloop.realtime import records
from cortexloop.realtime.journal import scan
from cortexloop.rig.server import split_address

HERE = Path(cortexloop.rig.__file__).parent


def fake_psychopy(monkeypatch: pytest.MonkeyPatch, keys: dict[int, list[str]]) -> dict[str, Any]:
    """A window that flips at once and remembers what was drawn; keys: pressed at the n-th time of asking."""
    seen: dict[str, Any] = {"drawn": [], "flips": 0, "asked": 0}

    class Window:
        nDroppedFrames = 0  # noqa: N815

        def __init__(self, **_: Any) -> None:
            self.calls: list[Any] = []

        def callOnFlip(self, function: Any) -> None:  # noqa: N802
            self.calls.append(function)

        def flip(self) -> None:
            seen["flips"] += 1
            for function in self.calls:
                function()
            self.calls.clear()

        def close(self) -> None:
            pass

    class ImageStim:
        image: Any = None

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def draw(self) -> None:
            if self.image is not None:
                seen["drawn"].append(self.image)

    def get_keys(_: list[str]) -> list[str]:
        seen["asked"] += 1
        return keys.get(seen["asked"], [])

    parts = {
        "core": types.SimpleNamespace(getTime=time.perf_counter),
        "event": types.SimpleNamespace(getKeys=get_keys),
        "visual": types.SimpleNamespace(Window=Window, Circle=ImageStim, ImageStim=ImageStim),
    }
    package = types.ModuleType("psychopy")
    for name, part in parts.items():
        setattr(package, name, part)
    monkeypatch.setitem(sys.modules, "psychopy", package)
    return seen


def test_psychopy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = fake_psychopy(monkeypatch, {15: ["escape"]})
    script = runpy.run_path(str(HERE / "examples" / "psychopy_rig.py"))
    script["main"].__globals__["SYNC_EVERY_S"] = 0.0
    told: list[list[float]] = []

    def count(onsets: list[float]) -> Any:
        told.append(onsets)
        values = np.arange(float(len(onsets)))[:, None]
        if len(told) == 1:
            values[-1] = np.nan
        return values

    with make_session(tmp_path / "kept") as session, serving(session) as server:
        script["main"].__globals__["ADDRESS"] = server.zmq_address
        script["main"](count)
        assert session.state == "paused"
        assert "Escape was pressed" in session.status().text
    entries = list(scan(tmp_path / "kept" / "session.rigj").records())
    shown = [entry.events for entry in entries if isinstance(entry, records.ShownEvents)]
    outcomes = [event.outcome for events in shown for event in events]
    assert outcomes[:14] == ["ok"] * 14
    assert set(outcomes[14:]) == {"abort"}
    assert [event.t_on for events in shown[: len(told)] for event in events] == [t for times in told for t in times]
    assert any(isinstance(entry, records.ClockMapping) and entry.clock == "psychopy" for entry in entries)
    first = next(entry for entry in entries if isinstance(entry, records.Told))
    assert first.header.status == ["ok"] * 5 + ["missing"]
    images = {(np.flipud(x) / 127.5 - 1).tobytes() for x in [*pictures(12), *pictures(2, seed=99)]}
    assert len(seen["drawn"]) == 14 * 6
    assert all(image.tobytes() in images for image in seen["drawn"])


TRIAL_RECORD = """
classdef Trials < handle
    properties
        User = struct()
        Quit = false
    end
end
"""

COUNT_SPIKES = """
function responses = count_spikes(pres_ids, onsets, units)
responses = zeros(numel(pres_ids), numel(units));
for k = 1:numel(pres_ids), responses(k, :) = str2double(pres_ids{k}(end)) + onsets(k) / 1000; end
end
"""

MONKEYLOGIC = """
pkg load instrument-control
addpath('%s'); addpath('%s'); addpath('%s');
trials = Trials();
evolution_userloop([], trials);
number = 0;
while true
    evolution_userloop([], trials);
    if trials.Quit, break; end
    number = number + 1;
    n = numel(trials.User.files);
    levels = 0;
    for k = 1:n, levels = levels + sum(double(imread(trials.User.files{k}))(:)); end
    outcome = repmat({'ok'}, 1, n);
    if number == 2, outcome(2:end) = {'abort'}; end
    trials.User.outcome = outcome;
    trials.User.onsets_ms = 250 * (1:n);
end
printf('%%d trials\\n', number);
"""


@pytest.mark.skipif(
    shutil.which("octave-cli") is None, reason="no octave-cli (Debian: octave octave-instrument-control)"
)
def test_monkeylogic_userloop(tmp_path: Path):
    """In Octave, with a stand-in for MonkeyLogic: what a broken trial did not show comes again."""
    with make_session(tmp_path / "kept", within_ms=1000.0) as session:
        with serving(session, zmq=None, secret="correct horse") as server:
            _, port = split_address(str(server.tcp_address))
            loop = (HERE / "examples" / "evolution_userloop.m").read_text()
            for before, after in (
                ("'192.168.1.10'", "'127.0.0.1'"), ("PORT = 5558", f"PORT = {port}"),
                ("the secret of the server", "correct horse"), ("PER_TRIAL = 5", "PER_TRIAL = 4"),
            ):  # fmt: skip
                assert before in loop
                loop = loop.replace(before, after)
            (tmp_path / "evolution_userloop.m").write_text(loop)
            (tmp_path / "Trials.m").write_text(TRIAL_RECORD)
            (tmp_path / "count_spikes.m").write_text(COUNT_SPIKES)
            (tmp_path / "day.m").write_text(MONKEYLOGIC % (HERE / "matlab", tmp_path, tmp_path))
            done = subprocess.run(
                ["octave-cli", "--quiet", "--no-history", str(tmp_path / "day.m")],
                capture_output=True, text=True, timeout=60,
            )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert session.state == "finished"
        assert session.status().reshown == 1
    entries = list(scan(tmp_path / "kept" / "session.rigj").records())
    told = [entry for entry in entries if isinstance(entry, records.Told)]
    assert sum(len(entry.header.item_ids) for entry in told) == 18
    for entry in told:
        assert entry.header.units == ["ch17"]
        for pres_id, row in zip(entry.header.pres_ids or [], entry.responses.numpy(), strict=True):
            assert int(row[0]) - int(row[0] - int(pres_id[-1])) == int(pres_id[-1])

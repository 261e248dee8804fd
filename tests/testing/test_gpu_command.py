"""`python -m cortexloop.testing.gpu`: limits, logs, outcomes; and a rehearsal of all of it."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cortexloop.testing import gpu

PYTHON = sys.executable


def run(tmp_path: Path, code: str, limit: float = 30.0, seconds: float = 60.0, **options: object) -> gpu.Outcome:
    runner = gpu.Runner(tmp_path, seconds)
    return runner.run(gpu.Stage("a stage", ((PYTHON, "-c", code),), limit=limit, **options))  # type: ignore[arg-type]


def test_what_a_stage_prints_is_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []
    outcome = run(tmp_path, "print('one'); print('two')", after=lambda: done.append(1))
    assert (outcome.state, outcome.line, outcome.good) == ("passed", "two", True)
    assert done == [1]
    shown = capsys.readouterr().out
    assert "=== a stage, at most 30 s" in shown
    assert "one\ntwo\n--- a stage: passed" in shown
    assert (tmp_path / "log.txt").read_text() == shown


def test_a_failing_command_ends_its_stage(tmp_path: Path) -> None:
    runner = gpu.Runner(tmp_path, 60)
    commands = ((PYTHON, "-c", "print('bad'); raise SystemExit(3)"), (PYTHON, "-c", "print('never')"))
    outcome = runner.run(gpu.Stage("a stage", commands, after=lambda: pytest.fail("it did not pass")))
    assert (outcome.state, outcome.line, outcome.good) == ("failed", "bad", False)


def test_a_stage_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    child = "import time; print('child', flush=True); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    outcome = run(tmp_path, code, limit=2.0)
    assert (outcome.state, outcome.line, outcome.good) == ("out of time", "child", False)
    assert time.monotonic() - start < 30


def test_without_time_left_a_stage_does_not_start(tmp_path: Path) -> None:
    assert run(tmp_path, "raise SystemExit", seconds=0.0).state == "out of time"


def test_a_skipped_stage_says_why(tmp_path: Path) -> None:
    outcome = gpu.Runner(tmp_path, 60).run(gpu.Stage("a stage", (), skipped="no such tool"))
    assert (outcome.state, outcome.line, outcome.good) == ("skipped", "no such tool", True)


def test_modules_are_copied_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(gpu, "built", lambda: False)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    pytest.importorskip("pybind11")
    folder = tmp_path / "build" / "gpu"
    folder.mkdir(parents=True)
    (tmp_path / "package").mkdir()
    for name in ("_cpu.abi.so", "_cuda.abi.so", "other.so"):
        (folder / name).write_text(name)
    stage = gpu.build_stage("native", rehearse=False)
    assert stage.commands[0][:2] == ("cmake", "-S")
    assert "-DCORTEXLOOP_CUDA=ON" in stage.commands[0]
    assert stage.after is not None
    stage.after()
    assert sorted(p.name for p in (tmp_path / "package").iterdir()) == ["_cpu.abi.so", "_cuda.abi.so"]


def test_tools_that_are_missing_skip_their_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(gpu, "built", lambda: False)
    assert gpu.sanitizer_stage("memcheck", 60, rehearse=False).skipped == "compute-sanitizer is not installed"
    assert gpu.build_stage("native", rehearse=False).skipped == "CMake or pybind11 is not installed"
    monkeypatch.setattr(gpu, "built", lambda: True)
    assert gpu.build_stage("native", rehearse=False).skipped == "the CUDA module is there"


def test_unknown_stages_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--only", "tests,coffee"])
    assert "no stage named coffee; there are build, doctor, tests" in capsys.readouterr().err


def test_outside_a_checkout_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "is no checkout of cortexloop: it has no tests/gpu" in capsys.readouterr().err


def test_rehearsal(tmp_path: Path) -> None:
    """Every stage on the CPU: the GPU tests with a stand-in, the sanitizers' program, all parts of the benchmark.

    From the bare checkout, wherever the package under test is installed.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "python")}
    command = [PYTHON, "-m", "cortexloop.testing.gpu", "--rehearse", "--out", str(tmp_path), "--commit", "abc-dirty"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    lines = {line.split("  ")[0]: line for line in (tmp_path / "summary.txt").read_text().splitlines()}
    assert set(lines) == {"build", "doctor", "tests cuda", "benchmark", "memcheck", "racecheck", "tests triton"}
    passed = [name for name, line in lines.items() if "passed" in line]
    assert passed == ["doctor", "tests cuda", "benchmark", "memcheck", "racecheck"]
    (rows_file,) = tmp_path.glob("*.csv")
    with rows_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {"bank on a GPU", "moments on a GPU"}
    assert {(row["cortexloop_commit"], row["dirty"]) for row in rows} == {("abc", "True")}
    assert {row["direction"] for row in rows} == {
        "ceiling", "latency, host to host", "forward", "gradient of pairs", "stream, host to host", "update"
    }  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 3

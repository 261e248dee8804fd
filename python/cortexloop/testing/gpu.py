"""One command for a machine with a GPU: build in place, test, check memory accesses, measure, print one table.

    PYTHONPATH=python python -m cortexloop.testing.gpu --out RESULTS

Needs a checkout (tests and benchmarks are not installed), nvcc, CMake, pybind11 and pytest, and no network. Every stage
has a limit of its own within `--minutes`, so that one that hangs costs no other its results: the log and the rows are
written to `--out` as they come. Exit code 0: every stage that could run passed. `--rehearse` goes through all stages
on a CPU, on small cases and without building anything, to find mistakes before a GPU is at hand.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "python" / "cortexloop"


@dataclass(frozen=True)
class Stage:
    """Something to run.

    Attributes:
        name: for people.
        commands: run one after the other, as long as they succeed.
        limit: seconds for all of them; 0 = what is left.
        after: run when they have succeeded.
        skipped: why it does not run here, or nothing.
        environment: further variables.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    limit: float = 0.0
    after: Callable[[], None] | None = None
    skipped: str = ""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a stage went: "passed", "failed", "out of time" or "skipped", and the last line that it printed."""

    stage: str
    state: str
    seconds: float
    line: str

    @property
    def good(self) -> bool:
        return self.state in ("passed", "skipped")


class Runner:
    """Runs stages one after the other, echoes what they print, and writes it to `log.txt`.

    Args:
        out: folder for the log.
        seconds: for all stages.
    """

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.deadline = out, time.monotonic() + seconds
        self.outcomes: list[Outcome] = []
        out.mkdir(parents=True, exist_ok=True)
        self.log = out / "log.txt"
        self.log.write_text("", encoding="utf-8")

    def say(self, line: str) -> None:
        """Print and write at once: what is buffered is lost when the command is stopped from outside."""
        print(line, flush=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"{line}\n")

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.monotonic()

    def run(self, stage: Stage) -> Outcome:
        """Run one stage within its limit."""
        limit = min(stage.limit or self.left, self.left)
        started = time.monotonic()
        self.say(f"=== {stage.name}, at most {max(0, limit):.0f} s")
        if stage.skipped:
            outcome = Outcome(stage.name, "skipped", 0.0, stage.skipped)
        elif limit <= 0:
            outcome = Outcome(stage.name, "out of time", 0.0, "the stages before took all of it")
        else:
            state, line = "passed", ""
            for command in stage.commands:
                self.say(f"$ {' '.join(command)}")
                code, line = follow(command, started + limit - time.monotonic(), self.say, stage.environment)
                if code != 0:
                    state = "out of time" if code is None else "failed"
                    break
            if state == "passed" and stage.after is not None:
                stage.after()
            outcome = Outcome(stage.name, state, time.monotonic() - started, line)
        self.outcomes.append(outcome)
        self.say(f"--- {stage.name}: {outcome.state} after {outcome.seconds:.0f} s")
        return outcome


def follow(
    command: Sequence[str], limit: float, say: Callable[[str], object], environment: dict[str, str]
) -> tuple[int | None, str]:
    """Run a command and pass on what it prints; (exit code, last line), with None for one that ran out of time."""
    path = os.pathsep.join([str(PACKAGE.parent), *filter(None, sys.path)])
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that what it started ends with it
    )
    last = [""]

    def echo() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip("\n"))
            last[0] = line.strip() or last[0]

    reader = threading.Thread(target=echo, daemon=True)
    reader.start()
    try:
        code: int | None = process.wait(timeout=max(0.0, limit))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        stop(process)
    reader.join(timeout=5)
    if process.stdout is not None and not reader.is_alive():
        process.stdout.close()
    return code, last[0]


def stop(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started; a few seconds to end by itself first."""
    for ending, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, ending)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue


def built() -> bool:
    """Whether the CUDA module lies beside the package."""
    return importlib.util.find_spec("cortexloop._cuda") is not None


def build_stage(architectures: str, *, rehearse: bool) -> Stage:
    """CMake with the installed pybind11; the modules are copied beside the package."""
    folder = ROOT / "build" / "gpu"

    def install() -> None:
        for module in (*folder.glob("_cpu*.so"), *folder.glob("_cuda*.so")):
            shutil.copy(module, PACKAGE / f".{module.name}")
            (PACKAGE / f".{module.name}").rename(PACKAGE / module.name)  # not into a file that is loaded somewhere

    skipped = "a rehearsal builds nothing" if rehearse else "the CUDA module is there" if built() else ""
    if not skipped and (shutil.which("cmake") is None or importlib.util.find_spec("pybind11") is None):
        skipped = "CMake or pybind11 is not installed"
    if skipped:
        return Stage("build", (), skipped=skipped)
    import pybind11

    configure = [
        "cmake", "-S", str(ROOT), "-B", str(folder),
        "-DCORTEXLOOP_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *(["-G", "Ninja"] if shutil.which("ninja") else []),
    ]  # fmt: skip
    processors = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return Stage(
        "build",
        (tuple(configure), ("cmake", "--build", str(folder), "--parallel", processors)),
        limit=200,
        after=install,
    )


def tests_stage(backend: str, limit: float, *, rehearse: bool) -> Stage:
    """The tests of one backend. Warnings of other packages are shown; that a slower backend took over is an error."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/gpu",
        "-q",
        "-W",
        "default",
        "-W",
        "error::cortexloop.BackendWarning",
    ]
    command += ["-p", "no:cacheprovider", "--durations=5"]
    if rehearse:
        command += ["--rehearse-gpu=stand-in", "-k", "cuda and (numpy or plans or pairs or moments_exact)"]
        return Stage(
            f"tests {backend}", (tuple(command),), limit=limit, skipped="" if backend == "cuda" else "a rehearsal"
        )
    command += ["-k", "not triton" if backend == "cuda" else backend]
    return Stage(f"tests {backend}", (tuple(command),), limit=limit)


def sanitizer_stage(tool: str, limit: float, *, rehearse: bool) -> Stage:
    """compute-sanitizer over a short program; each allocation by itself, so that it sees where one ends."""
    program = (sys.executable, "tests/gpu/sanitizer_check.py")
    if rehearse:
        return Stage(tool, ((*program, "--rehearse"),), limit=limit)
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None:
        return Stage(tool, (), skipped="compute-sanitizer is not installed")
    command = (found, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *program)
    return Stage(tool, (command,), limit=limit, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def benchmark_stage(out: Path, seconds: float, commit: str | None, *, rehearse: bool) -> Stage:
    """The benchmark; it ends by itself a little before its limit."""
    command = [sys.executable, "benchmarks/bench_gpu.py", "--out", str(out)]
    command += ["--commit", commit] if commit else []
    if rehearse:
        command += ["--rehearse", "--device", "cpu", "--budget", "1", "--only"]
        command += ["ceilings,latency,throughput,gradient,stream,accuracy,moments,peers"]
    else:
        command += ["--budget", f"{seconds:.0f}"]
    return Stage("benchmark", (tuple(command),), limit=1.3 * seconds + 30)


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line per stage."""
    width = max(len(o.stage) for o in outcomes)
    return "\n".join(f"{o.stage:{width}s}  {o.state:11s} {o.seconds:5.0f} s  {o.line[:100]}" for o in outcomes)


STAGES = ("build", "doctor", "tests", "benchmark", "memcheck", "racecheck", "triton")
RESERVED = 50.0
"""Seconds that the benchmark leaves to each stage behind it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; the exit code is 0 if all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-results", help="folder for logs and rows")
    parser.add_argument("--minutes", type=float, default=9.3, help="for everything")
    parser.add_argument("--only", default=",".join(STAGES), help=f"stages, separated by commas: {', '.join(STAGES)}")
    parser.add_argument("--architectures", default="native", help="CUDA architectures to build for")
    parser.add_argument("--commit", help="of the sources, where they have no history; '-dirty' behind it if changed")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, on small cases")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",")
    unknown = sorted(set(wanted) - set(STAGES))
    if unknown:
        parser.error(f"no stage named {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if not (ROOT / "tests" / "gpu").is_dir():
        parser.error(f"{ROOT} is no checkout of cortexloop: it has no tests/gpu")
    rehearse = options.rehearse
    runner = Runner(options.out.resolve(), 60 * options.minutes)
    if "build" in wanted and not runner.run(build_stage(options.architectures, rehearse=rehearse)).good:
        return finish(runner)
    if "doctor" in wanted:
        runner.run(Stage("doctor", ((sys.executable, "-m", "cortexloop", "doctor"),), limit=60))
    if "tests" in wanted:
        runner.run(tests_stage("cuda", 120, rehearse=rehearse))
    behind = [stage for stage in ("memcheck", "racecheck", "triton") if stage in wanted]
    if "benchmark" in wanted:
        seconds = max(30.0, (runner.left - RESERVED * len(behind) - 30) / 1.3)
        runner.run(benchmark_stage(runner.out, seconds, options.commit, rehearse=rehearse))
    for stage in behind:
        if stage == "triton":
            runner.run(tests_stage("triton", 120, rehearse=rehearse))
        else:
            runner.run(sanitizer_stage(stage, 90, rehearse=rehearse))
    return finish(runner)


def finish(runner: Runner) -> int:
    """Print and write the table; the exit code."""
    text = summary(runner.outcomes)
    (runner.out / "summary.txt").write_text(f"{text}\n", encoding="utf-8")
    runner.say(f"\n{text}\nlog and rows: {runner.out}")
    return 0 if all(outcome.good for outcome in runner.outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

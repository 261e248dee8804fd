"""Timing on a GPU: interleaved rounds between events, ceilings of the machine, and rows that name the GPU.

Everything also runs on a CPU (`device` "cpu"), where a host clock stands in for events: a rehearsal without numbers
worth keeping.
"""

from __future__ import annotations

import gc
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from record import Row, _git, processor, quantiles
from report_gpu import OP


@dataclass(frozen=True)
class GpuContender:
    """Something that can be timed.

    Attributes:
        name: goes into the recorded row as `backend`.
        run: one complete evaluation of the case on input set number `i` (modulo their count), left on the device.
        fetch: float64 copy of what `run(0)` computes.
        prepare: brings shared state, such as the precision of torch's products, into place; not timed.
        reduced: computes in less than float32, so that a larger error is right.
    """

    name: str
    run: Callable[[int], Any]
    fetch: Callable[[], NDArray[np.float64]]
    prepare: Callable[[], Any] = lambda: None
    reduced: bool = False


class Clock:
    """Seconds between two points of a device's work."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        if self.gpu:
            self.first, self.last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long the device needs for what `work` launches."""
        if not self.gpu:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        self.first.record()
        work()
        self.last.record()
        self.last.synchronize()
        return self.first.elapsed_time(self.last) / 1e3


def measure(
    contenders: Sequence[GpuContender],
    device: torch.device,
    *,
    budget: float,
    slot: float = 0.02,
    min_rounds: int = 5,
    max_rounds: int = 40,
) -> dict[str, NDArray[np.float64]]:
    """Seconds per `run` of each contender, [rounds], all interleaved; the order rotates.

    A round gives every contender one call that is not timed and then calls that fill a slot. Each call takes another
    input set, so that inputs come from memory as in use.

    Args:
        budget: stop after this many seconds, but not before `min_rounds` rounds.
    """
    clock = Clock(device)
    repeats: dict[str, int] = {}
    for contender in contenders:
        contender.prepare()
        contender.run(0)
        once = clock.seconds(lambda c=contender: c.run(1))  # type: ignore[misc]
        repeats[contender.name] = max(1, min(2000, int(np.ceil(slot / max(once, 1e-6)))))
    if len(repeats) != len(contenders):
        raise ValueError(f"contenders need different names, got {[c.name for c in contenders]}")
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    collecting = gc.isenabled()
    gc.disable()
    try:
        deadline = time.perf_counter() + budget
        rounds = 0
        while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < deadline):
            shift = rounds % len(contenders)
            for contender in [*contenders[shift:], *contenders[:shift]]:
                contender.prepare()
                if repeats[contender.name] > 1:
                    contender.run(0)
                count = repeats[contender.name]

                def calls(contender: GpuContender = contender, count: int = count) -> None:
                    for i in range(count):
                        contender.run(i + 1)

                times[contender.name].append(clock.seconds(calls) / count)
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return {name: np.asarray(values) for name, values in times.items()}


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Ceilings:
    """What this GPU was seen to reach: bytes per second of a copy (read and written), FLOP per second of products."""

    copy: float
    half: float
    tf32: float
    fp32: float


def ceilings(device: torch.device, *, quick: bool = False) -> Ceilings:
    """Measure them, on random numbers: medians of five."""
    n = 256 if quick else 8192
    clock = Clock(device)

    def seconds(work: Callable[[], Any]) -> float:
        for _ in range(2):
            work()
        return float(np.median([clock.seconds(work) for _ in range(5)]))

    def copy() -> float:
        source = torch.randn(n * n * (1 if quick else 16), device=device)
        target = torch.empty_like(source)
        return 2 * source.numel() * 4 / seconds(lambda: target.copy_(source))

    def product(name: str, dtype: torch.dtype) -> float:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        precision(name)
        return 2.0 * n**3 / seconds(lambda: a @ b)

    rates = Ceilings(copy(), product("half", torch.float16), product("tf32", torch.float32), product("", torch.float32))
    precision("fp32")
    return rates


def precision(name: str) -> None:
    """Let float32 products of torch round to TF32 ("tf32") or not (anything else)."""
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    torch.backends.cudnn.allow_tf32 = name == "tf32"


def driver() -> str:
    """The driver's version as nvidia-smi tells it; "" where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


def gpu_name(device: torch.device) -> str:
    """The product name; of the processor in a rehearsal."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def slug(name: str) -> str:
    """nvidia-h200 for "NVIDIA H200": names the results file."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


@dataclass(frozen=True)
class Provenance:
    """The columns that are the same for all rows of one run."""

    name: str
    capability: str
    driver: str
    commit: str
    dirty: bool

    @classmethod
    def of(cls, device: torch.device, commit: str | None) -> Provenance:
        """Of this machine; `commit` where the checkout has no history, "-dirty" behind it if changed."""
        if commit is None:
            changed = [line for line in _git("status", "--porcelain").splitlines() if "benchmarks/results" not in line]
            commit = _git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
        major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        return cls(
            gpu_name(device),
            f"sm_{major}{minor}" if device.type == "cuda" else "",
            driver(),
            commit.removesuffix("-dirty"),
            commit.endswith("-dirty"),
        )

    def row(self, **values: Any) -> Row:
        """A row; what is not given is empty."""
        import cortexloop as cl

        ours = str(values["backend"]).startswith("cortexloop")
        empty = {
            "op": OP,
            "version": cl.__version__ if ours else torch.__version__,
            "isa": self.capability,
            "threads": 1,
            "q20": values["q50"],
            "q80": values["q50"],
            "rounds": 1,
            "ratio_to": "",
            "ratio": "",
            "ratio_q20": "",
            "ratio_q80": "",
            "machine": slug(self.name),
            "cpu_or_gpu": self.name,
            "driver": self.driver,
            "torch": torch.__version__,
            "cortexloop_commit": self.commit,
            "dirty": self.dirty,
            "utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        return Row(**{**empty, **values})

    def timed(
        self, times: dict[str, NDArray[np.float64]], *, case: str, batch: int, direction: str, pairs: int
    ) -> list[Row]:
        """Microseconds per (image, model) pair, and each one's ratio to the first."""
        first = next(iter(times))
        rows = []
        for name, seconds in times.items():
            q50, q20, q80 = quantiles(seconds * 1e6 / pairs)
            ratio, ratio_q20, ratio_q80 = quantiles(seconds / times[first])
            rows.append(
                self.row(
                    case=case, batch=batch, direction=direction, backend=name, metric="time", unit="us/pair",
                    q50=q50, q20=q20, q80=q80, rounds=len(seconds),
                    ratio_to=first, ratio=ratio, ratio_q20=ratio_q20, ratio_q80=ratio_q80,
                )
            )  # fmt: skip
        return rows


def latencies(run: Callable[[], Any], *, count: int, budget: float) -> NDArray[np.float64]:
    """Seconds of each call of `run`, which returns when the result is in host memory; fewer calls if time runs out."""
    for _ in range(min(count, 200)):
        run()
    found = np.empty(count)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + budget
        done = 0
        now = time.perf_counter
        while done < count and (done < 20 or now() < deadline):
            start = now()
            run()
            found[done] = now() - start
            done += 1
    finally:
        if collecting:
            gc.enable()
    return found[:done]

"""Interleaved measurement, and rows that say where and with what they were measured."""

from __future__ import annotations

import csv
import gc
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Contender:
    """Something that can be timed.

    Attributes:
        name: goes into the recorded row as `backend`.
        run: one complete evaluation of the case; what is timed.
        prepare: brings shared state, such as a thread count, into place; not timed.
        fetch: float64 copy of what the last `run` computes: [B, N] responses or [B, H, W, 3] gradients.
    """

    name: str
    run: Callable[[], Any]
    fetch: Callable[[], NDArray[np.float64]]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Row:
    """One recorded number; the columns of `results/<machine>.csv`.

    `ratio` is this row's figure over that of the backend named in `ratio_to`, as the median over rounds of the ratio
    within a round: both ran in the same process within the same moment, so that a busy machine slows both.
    """

    case: str
    batch: int
    op: str
    direction: str
    backend: str
    version: str
    isa: str
    threads: int
    metric: str
    unit: str
    q50: float
    q20: float
    q80: float
    rounds: int
    ratio_to: str
    ratio: float | str
    ratio_q20: float | str
    ratio_q80: float | str
    machine: str
    cpu_or_gpu: str
    driver: str
    torch: str
    cortexloop_commit: str
    dirty: bool
    utc: str


COLUMNS = tuple(field.name for field in fields(Row))


def measure(
    contenders: Sequence[Contender], *, budget: float, min_rounds: int = 5, max_rounds: int = 60, slot: float = 0.02
) -> dict[str, NDArray[np.float64]]:
    """Seconds per `run` of each contender, [rounds], all interleaved.

    A round gives every contender a slot: a pause in which threads of the one before go to sleep, one call that is not
    timed (unless a call alone fills the slot), then calls for at least `slot` seconds. The order rotates.

    Args:
        budget: stop after this many seconds, but not before `min_rounds` rounds.
    """
    repeats = {}
    for contender in contenders:
        contender.prepare()
        contender.run()
        start = time.perf_counter()
        contender.run()
        repeats[contender.name] = max(1, int(np.ceil(slot / (time.perf_counter() - start))))
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
                time.sleep(0.003)
                if repeats[contender.name] > 1:
                    contender.run()
                start = time.perf_counter()
                for _ in range(repeats[contender.name]):
                    contender.run()
                times[contender.name].append((time.perf_counter() - start) / repeats[contender.name])
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return {name: np.asarray(values) for name, values in times.items()}


def quantiles(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile."""
    q50, q20, q80 = np.quantile(values, [0.5, 0.2, 0.8])
    return float(q50), float(q20), float(q80)


def processor() -> str:
    """The processor's own name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    names = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return names[0].strip() if names else platform.machine()


def _zen_generation() -> str:
    """AMD's server names hide the generation on virtual machines; family and model give it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    family = re.search(r"^cpu family\s*:\s*(\d+)$", text, re.MULTILINE)
    if "AuthenticAMD" not in text or not family:
        return ""
    avx512 = " avx512f" in text
    return {23: "zen2", 25: "zen4" if avx512 else "zen3", 26: "zen5"}.get(int(family[1]), "")


def machine() -> str:
    """A slug for the kind of machine, such as amd-epyc-zen5-2c: processor and cores, never a host's name."""
    name = re.sub(r"\((R|TM)\)|@.*$|\b(CPU|Processor|\d+-Core)\b", " ", processor(), flags=re.IGNORECASE)
    parts = [name, _zen_generation(), f"{len(os.sched_getaffinity(0))}c" if hasattr(os, "sched_getaffinity") else ""]
    return "-".join(re.findall(r"[a-z0-9]+", " ".join(parts).lower()))


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False, timeout=30
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def provenance() -> dict[str, str | bool]:
    """The columns that are the same for all rows of one run. Changed results do not count as a changed project."""
    import torch

    changed = [line for line in _git("status", "--porcelain").splitlines() if "benchmarks/results" not in line]
    return {
        "machine": machine(),
        "cpu_or_gpu": processor(),
        "driver": "",
        "torch": torch.__version__,
        "cortexloop_commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(changed),
        "utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def append(rows: Iterable[Row], path: Path) -> None:
    """Append rows to a results file, with a header if it is new.

    Raises:
        ValueError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(encoding="utf-8", newline="") as file:
            header = tuple(next(csv.reader(file)))
        if header != COLUMNS:
            raise ValueError(f"{path} has the columns {header}, expected {COLUMNS}")
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            values = asdict(row)
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values.items()})


def read(path: Path) -> list[dict[str, str]]:
    """All rows of a results file, oldest first, as strings."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))

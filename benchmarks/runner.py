"""What the scripts `bench_*.py` of factor models share: parts in processes of their own, printing, recording."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

import cortexloop as cl
from bench_bank import show
from bench_evolution import settle_memory
from record import RESULTS, Row, append, machine

Part = Callable[[int, float], list[Row]]
"""(threads, seconds for each set of contenders) -> rows."""


def run_part(script: str, part: str, threads: int, budget: float) -> list[Row]:
    """Run one part in a fresh process with a fixed number of threads.

    Raises:
        RuntimeError: the process failed; its own message is above.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "CORTEXLOOP_NUM_THREADS")
    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder) / "rows.json"
        command = [sys.executable, script, "--child", part, "--threads", str(threads), "--budget", str(budget)]
        environment = dict(os.environ, **dict.fromkeys(names, str(threads)))
        done = subprocess.run([*command, "--rows-file", str(rows_file)], env=environment, check=False, timeout=900)
        if done.returncode != 0:
            raise RuntimeError(f"part {part!r} with {threads} threads failed with exit code {done.returncode}")
        return [Row(**row) for row in json.loads(rows_file.read_text(encoding="utf-8"))]


def main(
    script: str,
    description: str | None,
    parts: Mapping[str, Part],
    *,
    threads: str = "1,2",
    budget: float = 8.0,
    untimed: Collection[str] = (),
) -> int:
    """The command line of a script: measure, print, and on request record.

    Args:
        script: its file.
        untimed: parts whose numbers do not depend on threads; they run once.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(parts), help=f"parts, separated by commas: {', '.join(parts)}")
    parser.add_argument("--threads", default=threads, help="thread counts, separated by commas")
    parser.add_argument("--budget", type=float, default=budget, help="seconds for each set of contenders")
    parser.add_argument("--record", action="store_true", help=f"append rows to {RESULTS.name}/<machine>.csv")
    parser.add_argument("--busy", action="store_true", help="record although other programs are using the processor")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rows-file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        settle_memory()
        torch.set_num_threads(int(options.threads))
        cl.set_num_threads(int(options.threads))
        rows = parts[options.child](int(options.threads), options.budget)
        options.rows_file.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
        return 0
    chosen = options.only.split(",")
    unknown = sorted(set(chosen) - set(parts))
    if unknown:
        parser.error(f"no part named {', '.join(unknown)}; there are {', '.join(parts)}")
    if options.record and not options.busy and os.getloadavg()[0] > 0.75:
        parser.error(f"the load average is {os.getloadavg()[0]:.1f}: wait until it is below 0.75, or add --busy")
    start = time.perf_counter()
    failed = []
    for part in chosen:
        for count in map(int, options.threads.split(",") if part not in untimed else ["1"]):
            try:
                found = run_part(script, part, count, options.budget)
            except RuntimeError as problem:  # the other parts are still worth having
                failed.append(str(problem))
                continue
            show(found)
            if options.record and found:
                append(found, RESULTS / f"{machine()}.csv")
    print(f"{time.perf_counter() - start:.0f} s", *failed, sep="\n")
    return 1 if failed else 0

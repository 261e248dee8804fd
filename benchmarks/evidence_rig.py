"""What a session survives and how fast it answers: kills at random moments, latencies on this machine.

    python benchmarks/evidence_rig.py [--quick] [--write]

Kills are those of `tests/rig/kills.py`, latencies those of `cortexloop rig selftest`. `--write` puts the numbers into
`docs/results/rig-kills.csv` and `rig-latency.csv`, and the tables into `docs/rig.md`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import evidence
from evidence import ROOT, Result
from record import machine

DOCUMENT = ROOT / "docs" / "rig.md"
COUNTS = {
    "kills": "kills",
    "server": "of the server",
    "client": "of the client",
    "restarts": "restarts that got as far as replaying the journal",
    "torn": "of them with an unfinished record at the end",
    "sessions": "sessions",
    "batches": "batches, compared pixel by pixel",
    "presentations": "presentations, each told once",
    "differences": "differences from sessions that nobody killed",
}


def kills(quick: bool) -> list[Result]:
    """One campaign."""
    numbers = ["--kills", "20", "--sessions", "1"] if quick else ["--kills", "1000", "--sessions", "40"]
    found = _json([sys.executable, str(ROOT / "tests" / "rig" / "kills.py"), *numbers])
    found["differences"] = len(found["differences"])
    return [{"count": name, "number": int(found[name])} for name in COUNTS]


def kills_text(rows: Sequence[Mapping[str, str]]) -> str:
    """The table: a line per count."""
    return evidence.markdown(["", "number"], [[COUNTS[row["count"]], f"{int(row['number']):,}"] for row in rows])


def latency(quick: bool) -> list[Result]:
    """One self-test."""
    numbers = ["-n", "20", "--batches", "3"] if quick else ["-n", "2000", "--batches", "200"]
    found = _json([sys.executable, "-m", "cortexloop", "rig", "selftest", "--json", *numbers])
    return [
        {"what": what, "machine": machine(), "n": times["n"], **{q: float(times[q]) for q in QUANTILES}}
        for what, times in found["milliseconds"].items()
    ]


QUANTILES = ("p50", "p99", "p99.9", "max")


def latency_text(rows: Sequence[Mapping[str, str]]) -> str:
    """The table: a line per measurement."""
    header = [f"milliseconds on `{rows[0]['machine']}`", "n", "median", "99 %", "99.9 %", "longest"]
    lines: list[list[str | float]] = [
        [row["what"], row["n"], *(float(row[q]) if int(row["n"]) >= _least(q) else "" for q in QUANTILES)]
        for row in rows
    ]
    return evidence.markdown(header, lines)


def _least(quantile: str) -> int:
    """How many measurements a quantile needs to mean anything."""
    return {"p99": 100, "p99.9": 1000}.get(quantile, 1)


def _json(command: list[str]) -> dict[str, Any]:
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if not result.stdout:
        raise SystemExit(f"{' '.join(command)} failed with exit code {result.returncode}")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def main() -> None:
    """Measure, print, write if asked to."""
    chosen = evidence.options(__doc__)
    evidence.finish("rig-kills", kills(chosen.quick), kills_text, chosen, DOCUMENT)
    evidence.finish("rig-latency", latency(chosen.quick), latency_text, chosen, DOCUMENT)


if __name__ == "__main__":
    main()

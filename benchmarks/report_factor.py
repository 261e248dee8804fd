"""The README's tables of factor models, readouts and saliency, and their targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tables import Recorded, Target, number, select, table

TITLES = {
    "feature_moments": "Streaming moments",
    "factorize": "Factorizing covariances",
    "factorized_readout": "Predictions of a factor model",
    "readout": "Readouts",
    "regression": "Regression",
    "saliency": "Saliency",
}
"""The operations of this section, in its order."""

Measured = Callable[[Sequence[Recorded]], float | None]

BEGIN, END = "<!-- factor:begin -->", "<!-- factor:end -->"
OURS = "cortexloop"


def of_section(rows: Sequence[Recorded]) -> list[Recorded]:
    """The rows of this section."""
    return [row for row in rows if row["op"] in TITLES]


def report(rows: Sequence[Recorded]) -> str:
    """The text between the markers; nothing where nothing was recorded."""
    rows = of_section(rows)
    out: list[str] = []
    for machine in dict.fromkeys(row["machine"] for row in rows):
        here = select(rows, machine=machine)
        out += [f"Measured on {here[-1]['cpu_or_gpu']} (`{machine}`), candidate and peers alternating in one process;"]
        out += ["medians. In brackets: how many times longer than cortexloop.", ""]
        for op, title in TITLES.items():
            timed = select(here, op=op, metric="time")
            for case in dict.fromkeys(row["case"] for row in timed):
                out += [f"**{title}, {case}**", "", *_comparison(select(timed, case=case)), ""]
            errors = select(here, op=op, direction="accuracy")
            if errors:
                out += [f"**{title}: {errors[0]['metric']}, against float64**", "", *_accuracy(errors), ""]
    return "\n".join(out).rstrip("\n") + "\n" if out else ""


def _comparison(rows: Sequence[Recorded]) -> list[str]:
    """Contenders down; what was computed, with how many threads and at which batch, across."""
    columns = list(dict.fromkeys((row["direction"], row["threads"], row["batch"]) for row in rows))
    columns.sort(key=lambda c: (int(c[1]), c[0], int(c[2])))
    several = len({c[0] for c in columns}) > 1, len({c[2] for c in columns}) > 1
    titles = []
    for direction, threads, batch in columns:
        words = [direction] if several[0] else []
        words.append(f"{threads} thread{'s' if threads != '1' else ''}")
        titles.append(", ".join([*words, *([f"batch {batch}"] if several[1] else [])]))
    lines = []
    for name in dict.fromkeys(row["backend"] for row in rows):
        cells, version = [], ""
        first = False
        for direction, threads, batch in columns:
            found = select(rows, backend=name, direction=direction, threads=threads, batch=batch)
            if not found:
                cells.append("")
                continue
            row = found[0]
            first |= row["ratio_to"] == name
            version = "" if name.startswith(OURS) else f" ({row['version'].split('+')[0]})"
            cells.append(
                number(row["q50"]) if row["ratio_to"] == name else f"{number(row['q50'])} ({number(row['ratio'])}x)"
            )
        lines.append([f"**{c}**" if first and c else c for c in (f"{name}{version}", *cells)])
    return table([rows[0]["unit"], *titles], lines)


def _accuracy(rows: Sequence[Recorded]) -> list[str]:
    """Contenders down, cases across."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    lines = []
    for name in dict.fromkeys(row["backend"] for row in rows):
        found = [select(rows, backend=name, case=case) for case in cases]
        lines.append([name, *[number(f[0]["q50"]) if f else "" for f in found]])
    return table(["features with", *cases], lines)


def _slowest(op: str, peer: str, direction: str, case: str = "", *, ours: str = OURS, **where: str) -> Measured:
    """The smallest ratio of a peer's time to ours over all recorded settings."""

    def measured(rows: Sequence[Recorded]) -> float | None:
        found = [
            float(row["ratio"])
            for row in select(rows, op=op, direction=direction, metric="time", ratio_to=ours, **where)
            if row["backend"].startswith(peer) and case in row["case"]
        ]
        return min(found, default=None)

    return measured


def targets() -> list[Target]:
    """The targets of this section."""
    aims = []
    for threads in ("1", "2"):
        for batch in ("64", "128"):
            measured = _slowest("feature_moments", "ceiling: torch.mm", "update", threads=threads, batch=batch)
            what = f"moments, share of the matrix-product rate, batch {batch}, {threads} thread(s)"
            aims.append(Target(what, measured, at_least=0.7))
        measured = _slowest("regression", "scikit-learn", "lasso", threads=threads)
        aims.append(Target(f"lasso of 64 neurons against scikit-learn, {threads} thread(s)", measured, at_least=20))
    for case in ("shared", "bank", "network"):
        measured = _slowest("saliency", "captum, one", "gradient", case)
        aims.append(Target(f"saliency of 64 neurons against captum, {case}", measured, at_least=8))
    return aims

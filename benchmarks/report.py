"""From recorded rows to the README's tables, and to the list of targets.

python benchmarks/report.py            write the tables between the README's markers
python benchmarks/report.py --check    exit code 1 if the README says anything else
python benchmarks/report.py --targets  measured ratios beside the ratios aimed at
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import report_factor
import report_gpu
from record import RESULTS, read
from tables import Recorded, Target, number, select, table

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
EVOLUTION_BEGIN, EVOLUTION_END = "<!-- evolution:begin -->", "<!-- evolution:end -->"
GPU_BEGIN, GPU_END = "<!-- gpu:begin -->", "<!-- gpu:end -->"

REDUCED = ("OpenVINO bf16",)  # compared with the fast kernel, others with the exact one
EXACT, FAST, PEAK = "cortexloop exact", "cortexloop fast", "fp32 FMA peak of one core"

CHOLESKY, DIAGONAL, WHOLE = "cortexloop CholeskyCMA", "cortexloop DiagonalCMA", "cortexloop"
FULL = ("pycma, full covariance", "EvoTorch CMAES, full covariance", "evosax CMA_ES")  # compared with CholeskyCMA
BATCHED = ("jax.vmap", "jax.lax.map", "batched")  # last words of the names of what is no loop over problems

KEY = ("machine", "case", "batch", "op", "direction", "backend", "threads", "metric")


def newest(rows: Iterable[Recorded]) -> list[Recorded]:
    """The last recorded row of everything that was measured, in the order of first recording."""
    latest: dict[tuple[str, ...], Recorded] = {}
    for row in rows:
        latest[tuple(row[k] for k in KEY)] = row
    return list(latest.values())


def load() -> list[Recorded]:
    """The newest rows of all machines."""
    return newest(row for path in sorted(RESULTS.glob("*.csv")) for row in read(path))


def _columns(rows: Sequence[Recorded]) -> list[tuple[str, str]]:
    """(threads, batch) pairs that occur, one thread first."""
    return sorted({(row["threads"], row["batch"]) for row in rows}, key=lambda c: (int(c[0]), int(c[1])))


def _column_title(threads: str, batch: str) -> str:
    return f"{threads} thread{'s' if threads != '1' else ''}, {batch} image{'s' if batch != '1' else ''}"


def comparison(rows: Sequence[Recorded]) -> list[str]:
    """Engines down, (threads, batch) across: milliseconds per evaluation, and how much faster the candidate is."""
    columns = _columns([row for row in rows if row["backend"] == EXACT])
    names = list(dict.fromkeys(row["backend"] for row in rows if row["backend"] != PEAK))
    lines = []
    for name in names:
        cells = []
        version = ""
        for threads, batch in columns:
            found = select(rows, backend=name, threads=threads, batch=batch)
            if not found:
                cells.append("")
                continue
            row = found[0]
            version = "" if name.startswith("cortexloop") else row["version"].split("+")[0]
            if name in (EXACT, FAST):
                cells.append(f"**{number(row['q50'])}**")
                continue
            same = select(rows, backend=FAST, threads=threads, batch=batch) if name in REDUCED else []
            ratio = float(row["ratio"]) / (float(same[0]["ratio"]) if same else 1.0)
            cells.append(f"{number(row['q50'])} ({number(str(ratio))}x)")
        label = f"{name} ({version})" if version else name
        lines.append([f"**{label}**" if name in (EXACT, FAST) else label, *cells])
    peaks = {row["batch"]: row for row in rows if row["backend"] == PEAK}
    if peaks:
        share = [
            f"{100 * float(peaks[batch]['ratio']):.0f} %" if threads == "1" and batch in peaks else ""
            for threads, batch in columns
        ]
        lines.append(["cortexloop exact, share of the fp32 FMA peak", *share])
    return table(["ms per evaluation", *[_column_title(*c) for c in columns]], lines)


def plain(rows: Sequence[Recorded]) -> list[str]:
    """One line per row: who, what, milliseconds per evaluation, and the ratio to the first contender."""
    lines = []
    for row in rows:
        name = row["backend"] if not row["isa"] else f"{row['backend']} ({row['isa']})"
        setting = _column_title(row["threads"], row["batch"])
        against = f"{number(row['ratio'])}x {row['ratio_to']}" if row["ratio_to"] != row["backend"] else ""
        computed = "responses" if row["direction"] == "forward" else "responses and gradient"
        lines.append([name, computed, f"{row['case']}, {setting}", number(row["q50"]), against])
    return table(["what", "computes", "on", "ms per evaluation", "time, compared"], lines)


def accuracy(rows: Sequence[Recorded]) -> list[str]:
    """Engines down: error against float64."""
    names = list(dict.fromkeys(row["backend"] for row in rows))
    kinds = ("quantiles over models", "worst model")
    metrics = [f"{metric}, {kind}" for metric in ("largest error", "1 - Pearson r") for kind in kinds]
    titles = ["largest error (SD), median model", "worst model", "1 - r, median model", "worst model"]
    lines = []
    for name in names:
        values = [next((r["q50"] for r in select(rows, backend=name, metric=m)), "") for m in metrics]
        lines.append([name, *[number(v) if v else "" for v in values]])
    return table(["compared with float64", *titles], lines)


def report(rows: Sequence[Recorded]) -> str:
    """The text between the first markers; nothing where nothing was recorded."""
    elsewhere = ("evolution", report_gpu.OP, report_gpu.MOMENTS_OP, *report_factor.TITLES)
    rows = [row for row in rows if row["op"] not in elsewhere]
    if not rows:
        return ""
    out: list[str] = []
    for machine in dict.fromkeys(row["machine"] for row in rows):
        here = select(rows, machine=machine)
        timed = select(here, metric="time")
        out += [f"Measured on {here[-1]['cpu_or_gpu']} (`{machine}`), candidate and peers alternating in one process;"]
        out += ["medians. An evaluation is one model on one 112 x 112 image. In brackets: how many times longer than"]
        out += ["cortexloop at the same precision (bf16: than fast; all others: than exact).", ""]
        for direction in ("forward", "forward+gradient"):
            for case in dict.fromkeys(row["case"] for row in select(timed, op="bank", direction=direction)):
                rows_of_case = select(timed, op="bank", direction=direction, case=case)
                if any(row["backend"] == EXACT for row in rows_of_case):
                    title = "Responses" if direction == "forward" else "Responses and input gradient"
                    out += [f"**{title}, {case}**", "", *comparison(rows_of_case), ""]
        others = [row for row in timed if row["op"] != "bank" or row["backend"].endswith((" threads", " 1 thread"))]
        if others:
            out += ["**Threads, older instruction sets, call overhead**", "", *plain(others), ""]
        errors = [row for row in here if row["metric"].startswith(("largest error", "1 - Pearson"))]
        if errors:
            out += [f"**Accuracy, {errors[0]['case']}, {errors[0]['batch']} images**", "", *accuracy(errors), ""]
    return "\n".join(out).rstrip("\n") + "\n"


def _problems_title(threads: str, problems: str) -> str:
    return f"{threads} thread{'s' if threads != '1' else ''}, {problems} problem{'s' if problems != '1' else ''}"


def optimisers(rows: Sequence[Recorded]) -> list[str]:
    """Optimisers down, (threads, problems) across: milliseconds per step, and how much faster ours of that kind is."""
    columns = _columns(rows)
    names = list(dict.fromkeys(row["backend"] for row in rows))
    lines = []
    for name in sorted(names, key=lambda n: (n not in (CHOLESKY, DIAGONAL), n not in FULL)):
        cells, label = [], name
        for threads, batch in columns:
            here = select(rows, threads=threads, batch=batch)
            found, same = select(here, backend=name), select(here, backend=CHOLESKY if name in FULL else DIAGONAL)
            if not found:
                cells.append("")
            elif name in (CHOLESKY, DIAGONAL):
                cells.append(f"**{number(found[0]['q50'])}**")
                label = f"**{name}**"
            else:
                ratio = f" ({number(str(float(found[0]['ratio']) / float(same[0]['ratio'])))}x)" if same else ""
                cells.append(f"{number(found[0]['q50'])}{ratio}")
                label = f"{name} ({found[0]['version']})"
        lines.append([label, *cells])
    return table(["ms per step", *[_problems_title(*c) for c in columns]], lines)


def generations(rows: Sequence[Recorded]) -> list[str]:
    """Ours and plain torch down, (threads, problems) across: generations per second of one problem."""
    timed = select(rows, metric="time")
    columns = _columns(timed)
    lines = []
    for name in dict.fromkeys(row["backend"] for row in timed):
        cells = []
        for threads, batch in columns:
            found = select(timed, backend=name, threads=threads, batch=batch)
            if not found:
                cells.append("")
                continue
            rate = number(str(1000 / float(found[0]["q50"])))
            cells.append(f"**{rate}**" if name == WHOLE else f"{rate} ({number(found[0]['ratio'])}x)")
        lines.append([f"**{name}**" if name == WHOLE else name, *cells])
    shares = {(row["threads"], row["batch"]): row for row in select(rows, metric="optimiser's share")}
    if shares:
        cells = [f"{100 * float(shares[c]['q50']):.1f} %" if c in shares else "" for c in columns]
        lines.append(["the optimiser's share of cortexloop's time", *cells])
    return table(["generations of one problem per second", *[_problems_title(*c) for c in columns]], lines)


def evolution_report(rows: Sequence[Recorded]) -> str:
    """The text between the second markers; nothing where nothing was recorded."""
    rows = select(rows, op="evolution")
    out: list[str] = []
    for machine in dict.fromkeys(row["machine"] for row in rows):
        here = select(rows, machine=machine)
        out += [f"Measured on {here[-1]['cpu_or_gpu']} (`{machine}`), candidate and peers alternating in one process;"]
        out += [
            "medians. A step is `ask` and `tell` for all problems, over a session of 75 generations; peers loop over"
        ]
        out += [
            "problems unless said otherwise. In brackets: how many times longer than cortexloop (full covariance: than"
        ]
        out += ["CholeskyCMA; all others: than DiagonalCMA).", ""]
        for case in dict.fromkeys(row["case"] for row in select(here, direction="optimiser step")):
            steps = select(here, direction="optimiser step", case=case)
            out += [f"**Optimisers, {case}**", "", *optimisers(steps), ""]
        for case in dict.fromkeys(row["case"] for row in select(here, direction="generation")):
            whole = select(here, direction="generation", case=case)
            out += [f"**Complete generations, {case}**", "", *generations(whole), ""]
    return "\n".join(out).rstrip("\n") + "\n" if out else ""


def with_table(readme: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """The README with the text between its markers.

    Raises:
        ValueError: the README lacks the markers.
    """
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise ValueError(f"README.md needs the markers {begin} and {end} once each")
    before, rest = readme.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{text}{end}{after}"


def with_tables(readme: str, rows: Sequence[Recorded]) -> str:
    """The README with all its tables. The markers of all but the first may be missing while there are no rows for them.

    Raises:
        ValueError: the README lacks markers.
    """
    readme = with_table(readme, report(rows))
    evolution = evolution_report(rows)
    if evolution or EVOLUTION_BEGIN in readme:
        readme = with_table(readme, evolution, EVOLUTION_BEGIN, EVOLUTION_END)
    if report_factor.of_section(rows) or report_factor.BEGIN in readme:
        readme = with_table(readme, report_factor.report(rows), report_factor.BEGIN, report_factor.END)
    if select(rows, op=report_gpu.OP) or GPU_BEGIN in readme:
        readme = with_table(readme, report_gpu.report(rows), GPU_BEGIN, GPU_END)
    return readme


def _times(rows: Sequence[Recorded], slow: str, fast: str, **where: str) -> float | None:
    """How many times faster `fast` is than `slow`, from their ratios to the same contender within rounds."""
    found = {name: select(rows, backend=name, metric="time", **where) for name in (slow, fast)}
    if not all(found.values()):
        return None
    a, b = found[slow][-1], found[fast][-1]
    return float(a["ratio"]) / float(b["ratio"])


def _ratio(slow: str, fast: str, case: str = "model", **where: str) -> Callable[[Sequence[Recorded]], float | None]:
    def measured(rows: Sequence[Recorded]) -> float | None:
        return _times([row for row in rows if case in row["case"]], slow, fast, **where)

    return measured


def _worst_error(rows: Sequence[Recorded]) -> float | None:
    found = {name: select(rows, backend=name, metric="largest error, worst model") for name in (FAST, "OpenVINO bf16")}
    if not all(found.values()):
        return None
    return float(found[FAST][-1]["q50"]) / float(found["OpenVINO bf16"][-1]["q50"])


def _best_loop(problems: str, threads: str) -> Callable[[Sequence[Recorded]], float | None]:
    """How many times faster our slower optimiser is than the fastest loop of a peer over the problems."""
    where = {"op": "evolution", "direction": "optimiser step", "batch": problems, "threads": threads, "metric": "time"}

    def measured(rows: Sequence[Recorded]) -> float | None:
        found = select(rows, **where)
        ours = [float(row["ratio"]) for row in found if row["backend"] in (CHOLESKY, DIAGONAL)]
        loops = [row for row in found if row["backend"] not in (CHOLESKY, DIAGONAL, *FULL)]
        theirs = [float(row["ratio"]) for row in loops if not row["backend"].endswith(BATCHED)]
        return min(theirs) / max(ours) if ours and theirs else None

    return measured


def _largest_share(rows: Sequence[Recorded]) -> float | None:
    return max((float(row["q50"]) for row in select(rows, metric="optimiser's share")), default=None)


def evolution_targets() -> list[Target]:
    """The targets for evolution on a CPU."""
    aims = []
    for threads in ("1", "2"):
        where = {"op": "evolution", "direction": "optimiser step", "batch": "1", "threads": threads}
        for slow, fast, aim in ((FULL[0], CHOLESKY, 100), ("pycma, diagonal", DIAGONAL, 5)):
            what = f"{fast} against {slow}, {threads} thread(s), 1 problem"
            aims.append(Target(what, _ratio(slow, fast, case="dim", **where), at_least=aim))
        what = f"256 problems against the fastest loop over a peer, {threads} thread(s)"
        aims.append(Target(what, _best_loop("256", threads), at_least=10))
    aims.append(Target("largest share of the optimiser in a generation", _largest_share, at_most=0.1))
    return aims


def targets() -> list[Target]:
    """The targets for a CPU."""
    forward = {"op": "bank", "direction": "forward", "threads": "1"}
    gradient = {"op": "bank", "direction": "forward+gradient", "threads": "1"}
    aims = []
    for batch, aim in (("1", 1.9), ("16", 2.5), ("64", 2.5)):
        measured = _ratio("OpenVINO f32", EXACT, batch=batch, **forward)
        aims.append(Target(f"exact against OpenVINO f32, 1 thread, {batch} image(s)", measured, at_least=aim))
    for batch in ("1", "16", "64"):
        measured = _ratio("OpenVINO bf16", FAST, batch=batch, **forward)
        aims.append(Target(f"fast against OpenVINO bf16, 1 thread, {batch} image(s)", measured, at_least=1.5))
    aims.append(Target("largest error of fast over that of OpenVINO bf16", _worst_error, at_most=1.0))
    for batch in ("1", "16"):
        measured = _ratio(EXACT, "cortexloop, one call per model", case="bank of", batch=batch, **forward)
        what = f"bank over one call per model, {batch} image(s): overhead of the bank"
        aims.append(Target(what, measured, at_most=1.05))
    measured = _ratio("torch eager", EXACT, case="every 12th", batch="16", **forward)
    aims.append(Target("bank against a loop of torch modules, 16 images", measured, at_least=8))
    for batch, aim in (("1", 7), ("16", 14)):
        measured = _ratio("torch eager", EXACT, batch=batch, **gradient)
        aims.append(Target(f"gradient against torch eager, 1 thread, {batch} image(s)", measured, at_least=aim))
        measured = _ratio(PEAK, EXACT, batch=batch, **gradient)
        aims.append(Target(f"gradient, share of the FMA peak, {batch} image(s)", measured, at_least=0.6))
    for direction, name in (("forward", EXACT), ("forward", FAST), ("forward+gradient", EXACT)):
        measured = _ratio(f"{name}, 1 thread", f"{name}, 2 threads", case="every 3rd", op="bank", direction=direction)
        aims.append(Target(f"two threads against one, {direction}, {name}", measured, at_least=1.9))
    for batch in ("1", "16"):
        where = {"op": "bank, AVX2 kernels", "batch": batch, "threads": "1"}
        measured = _ratio("torch.compile", EXACT, **where)
        aims.append(Target(f"AVX2 against torch.compile, 1 thread, {batch} image(s)", measured, at_least=1.3))
    return [*aims, *evolution_targets(), *report_factor.targets()]


def main() -> int:
    """Write, check or list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the README differs")
    parser.add_argument("--targets", action="store_true", help="list targets and what was measured")
    options = parser.parse_args()
    rows = load()
    if options.targets:
        for machine in dict.fromkeys(row["machine"] for row in rows):
            here = select(rows, machine=machine)
            aims = report_gpu.targets() if select(here, op=report_gpu.OP) else targets()
            print(machine, *[target.line(here) for target in aims], sep="\n")
        return 0
    readme = README.read_text(encoding="utf-8")
    wanted = with_tables(readme, rows)
    if options.check:
        if wanted != readme:
            print("README.md differs from the recorded rows; run: python benchmarks/report.py", file=sys.stderr)
            return 1
        return 0
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

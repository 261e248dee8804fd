"""What the experiments in `evidence_*.py` share: the V4 data pack, the shared network, tables in CSV and in the docs.

    CORTEXLOOP_V4_DATA=folder python benchmarks/evidence_recovery.py [--quick] [--write]

Each experiment prints its table; `--write` puts the numbers into `docs/results/<name>.csv` and the table between its
markers in `docs/factor-models.md`. `--quick` runs a small part of everything, to see that it works, and is never
written.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import cortexloop as cl
from cortexloop import features, io
from tables import number, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
DOCUMENT = ROOT / "docs" / "factor-models.md"
SHARED_MODEL = "from_ensemble_model/filters35"
SESSIONS = ("190923", "201025", "210325")

Result = dict[str, str | float | int]


def data_folder() -> Path:
    """The V4 data pack: `CORTEXLOOP_V4_DATA`, or beside the project.

    Raises:
        SystemExit: it is not there.
    """
    folder = Path(os.environ.get("CORTEXLOOP_V4_DATA", ROOT.parent / "shared" / "data" / "v4_compact"))
    if not folder.is_dir():
        raise SystemExit(f"no V4 data pack at {folder}; set CORTEXLOOP_V4_DATA to its folder")
    return folder


def session_images(session: str) -> NDArray[np.uint8]:
    """All images of a session, uint8 [n, 112, 112, 3], in the order of its responses."""
    batches = [pixels for _, pixels in io.open_images(data_folder() / f"images_{session}.zip").batches(200)]
    return np.concatenate(batches)


def session_responses(session: str) -> NDArray[np.float64]:
    """Responses averaged over repeats, [images, neurons]."""
    with np.load(data_folder() / "responses.npz", allow_pickle=False) as archive:
        return np.ascontiguousarray(archive[f"repeat_averaged/{session}"].T)


def single_trials(session: str) -> NDArray[np.float64] | None:
    """Responses of single trials, [images, neurons, repeats], NaN = not shown; None where the pack has none."""
    with np.load(data_folder() / "responses.npz", allow_pickle=False) as archive:
        key = f"raw/{session}"
        return np.ascontiguousarray(archive[key].transpose(1, 0, 2)).astype(np.float64) if key in archive else None


def shared_network(layer: int) -> features.BankFeatures:
    """A layer of the published shared compact model with 35 filters, after its ReLU."""
    (weights,) = io.load_shared(data_folder() / "shared_compact_models.npz", names=[SHARED_MODEL])
    return features.BankFeatures.of_weights(weights, layer, batch=50)


def compact_models(session: str) -> cl.ModelBank:
    """The published compact models of a session; model k predicts neuron k."""
    path = data_folder() / "compact_models.npz"
    names = [name for name in cl.ModelBank.load(path).names if name.startswith(f"{session}/")]
    return cl.ModelBank.load(path, names=names)


@dataclass(frozen=True)
class Options:
    """The command line of an experiment."""

    quick: bool
    write: bool


def options(description: str | None) -> Options:
    """Parse the command line. Experiments say nothing about time, so they take what threads there are."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small part of everything, to see that it works")
    parser.add_argument("--write", action="store_true", help="write the numbers and the table of the docs")
    chosen = parser.parse_args()
    if chosen.quick and chosen.write:
        parser.error("a quick run is no result; leave out --write or --quick")
    torch.set_num_threads(cl.get_num_threads())
    return Options(chosen.quick, chosen.write)


def write_results(name: str, rows: Sequence[Result]) -> None:
    """Write `docs/results/<name>.csv`, replacing what was there: a table comes from one run."""
    with (RESULTS / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def read_results(name: str) -> list[dict[str, str]]:
    """The rows of `docs/results/<name>.csv`."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def markdown(header: Sequence[str], lines: Sequence[Sequence[str | float]]) -> str:
    """A table for the docs; numbers with three digits."""
    cells = [[cell if isinstance(cell, str) else number(str(cell)) for cell in line] for line in lines]
    return "\n".join(table(header, cells)) + "\n"


def with_part(document: str, name: str, text: str) -> str:
    """The document with `text` between the markers of this name.

    Raises:
        ValueError: the markers are missing.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(f"the document needs the markers {begin} and {end} once each")
    before, rest = document.split(begin)
    return f"{before}{begin}\n{text}{end}{rest.split(end)[1]}"


def finish(
    name: str,
    rows: Sequence[Result],
    text: Callable[[Sequence[Mapping[str, str]]], str],
    chosen: Options,
    document: Path = DOCUMENT,
) -> None:
    """Print the table, and write numbers and table if asked to.

    Args:
        text: rows as they are read from the CSV -> the table.
        document: in which the table has its markers.
    """
    as_read = [{k: f"{v:.5g}" if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows]
    print(text(as_read))
    if chosen.write:
        write_results(name, rows)
        document.write_text(with_part(document.read_text(encoding="utf-8"), name, text(as_read)), encoding="utf-8")


def median(values: Sequence[float] | NDArray[np.floating] | torch.Tensor) -> float:
    """Median that leaves out NaN (figures that do not exist)."""
    return float(np.nanmedian(np.asarray(values, dtype=np.float64)))

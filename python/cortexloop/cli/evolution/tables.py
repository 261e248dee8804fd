"""The files of an experiment for other tools: generations and comparison as tables, codes as arrays, images as PNG."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import math
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cortexloop import io
from cortexloop.cli.console import BadInputError, bad_input
from cortexloop.cli.evolution import store
from cortexloop.cli.evolution.compare import Comparison, Entry, Estimate
from cortexloop.cli.evolution.findings import TRACES, EvolveFindings

KEYS = ("optimiser", "noise", "neuron", "seed", "generation")


def check_parquet() -> None:
    """Raises BadInputError where Parquet cannot be written."""
    if importlib.util.find_spec("pyarrow") is None:
        raise BadInputError('--parquet needs pyarrow: pip install "cortexloop[parquet]"')


def write_tables(findings: EvolveFindings) -> None:
    """Write generations.csv, comparison.csv where there is a comparison, codes.npz and images/.

    Raises:
        BadInputError: a full or protected disk.
    """
    out = findings.folder.out
    columns = (*KEYS, *TRACES)
    _write_csv(out / store.GENERATIONS, columns, _generation_rows(findings))
    if findings.options.parquet:
        _write_parquet(out / store.GENERATIONS, columns, _generation_rows(findings))
    if findings.comparison is not None:
        _write_csv(out / store.COMPARISON, COMPARISON_COLUMNS, comparison_rows(findings.comparison))
    write_codes(findings)
    write_images(findings)


def _generation_rows(findings: EvolveFindings) -> Iterator[tuple[Any, ...]]:
    """One row per optimiser, noise, neuron, seed and generation."""
    first = findings.settings.seed
    for c, (optimiser, noise) in enumerate(findings.conditions):
        for n, name in enumerate(findings.bank.names):
            for s in range(findings.layout.seeds):
                columns = [findings.traces[key][c, :, n, s].tolist() for key in TRACES]
                for g, values in enumerate(zip(*columns, strict=True)):
                    yield (optimiser, noise, name, first + s, g, *values)


COMPARISON_COLUMNS = (
    "measure", "noise", "optimiser", "score", "score_low", "score_high", "ratio", "ratio_low", "ratio_high", "ratio_to",
    "neurons",
)  # fmt: skip


def comparison_rows(comparison: Comparison) -> Iterator[tuple[Any, ...]]:
    """One row per measure, noise level ("all": over all of them) and optimiser."""
    measures: tuple[tuple[str, tuple[Entry, ...]], ...] = (("final", comparison.final), ("best", comparison.best))
    for measure, entries in measures:
        for entry in entries:
            ratio = entry.ratio or Estimate(math.nan, math.nan, math.nan)
            yield (
                measure, "all" if entry.noise is None else entry.noise, entry.optimiser,
                entry.score.value, entry.score.low, entry.score.high, ratio.value, ratio.low, ratio.high,
                comparison.genetic or "", comparison.neurons,
            )  # fmt: skip


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Numbers with nine digits, which identify a float32; NaN is an empty cell."""
    with bad_input(), io.atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(value) for value in row] for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.9g}"
    return value


def _write_parquet(beside: Path, columns: Sequence[str], rows: Iterator[tuple[Any, ...]]) -> None:
    """The same table as `beside`, with doubles that keep every digit; NaN becomes null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"optimiser": pa.string(), "neuron": pa.string(), "seed": pa.int64(), "generation": pa.int64()}
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in columns])
    with (
        bad_input(),
        io.atomic_path(beside.with_suffix(".parquet")) as temporary,
        pq.ParquetWriter(temporary, schema) as writer,
    ):
        while block := list(itertools.islice(rows, 1 << 16)):
            arrays = [
                pa.array([_null(v) for v in column], field.type)
                for column, field in zip(zip(*block, strict=True), schema, strict=True)
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _null(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


# ------------------------------------------------------------------------------------------------- codes, images


def write_codes(findings: EvolveFindings) -> None:
    """Write codes.npz: one row per evolution in the order of generations.csv, part after part."""
    layout = findings.layout
    runs = [
        (optimiser, noise, name, findings.settings.seed + s)
        for optimiser, noise in findings.conditions
        for name in findings.bank.names
        for s in range(layout.seeds)
    ]
    labels = {
        "optimiser": np.array([run[0] for run in runs]),
        "noise": np.array([run[1] for run in runs]),
        "neuron": np.array([run[2] for run in runs]),
        "seed": np.array([run[3] for run in runs], np.int64),
    }
    with (
        bad_input(),
        io.atomic_path(findings.folder.out / store.CODES) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        for name, values in labels.items():
            _member(archive, name, values.dtype, values.shape, [values])
        for name, source in _STORED.items():
            example = findings.folder.load_part(0, 0)[source]
            shape = (len(runs), *example.shape[1:])
            _member(archive, name, example.dtype, shape, (part[source] for part in _parts(findings)))


_STORED = {
    "best": "best_code",
    "best_score": "best_score",
    "best_response": "best_clean",
    "best_generation": "best_generation",
    "final": "centre_code",
    "final_response": "centre_clean",
}
"""Arrays of codes.npz and where a part has them."""


def _parts(findings: EvolveFindings) -> Iterator[dict[str, NDArray[Any]]]:
    for c in range(len(findings.conditions)):
        for group in range(findings.layout.groups):
            yield findings.folder.load_part(c, group)


def _member(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], blocks: Iterable[NDArray[Any]]
) -> None:
    """One array of an .npz, written block by block."""
    # A ZipInfo of its own has no time of day: the same run gives the same file.
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        for block in blocks:
            member.write(np.ascontiguousarray(block, dtype).tobytes())


def write_images(findings: EvolveFindings) -> None:
    """Write the best image of every evolution to images/, named by neuron, optimiser, noise and seed."""
    folder = findings.folder.out / store.IMAGES
    with bad_input():
        folder.mkdir(exist_ok=True)
        for c in range(len(findings.conditions)):
            for n in range(len(findings.bank)):
                for s in range(findings.layout.seeds):
                    with io.atomic_path(folder / image_name(findings, c, n, s)) as temporary:
                        Image.fromarray(findings.shown(c, n, s).best).save(temporary, "PNG")


def image_name(findings: EvolveFindings, condition: int, neuron: int, seed: int) -> str:
    """File name of the best image of an evolution."""
    optimiser, noise = findings.conditions[condition]
    parts = (findings.bank.names[neuron], optimiser, f"noise{noise:g}", f"seed{findings.settings.seed + seed}")
    return store.file_stem(neuron, *parts) + ".png"

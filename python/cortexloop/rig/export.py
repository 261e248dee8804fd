"""Sessions for other tools: one exporter for each format, found by its name.

A format of one's own is a class with the three members of `Exporter`, and a call of `register`.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import itertools
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from cortexloop.io import atomic_path
from cortexloop.rig.history import Recording
from cortexloop.rig.session_tables import Kind, Table, tables

__all__ = ["Exporter", "export", "exporters", "register"]


class Exporter(Protocol):
    """Writes sessions in one format.

    Attributes:
        name: by which users choose it.
        about: what it writes, in a few words.
    """

    name: str
    about: str

    def write(self, recording: Recording, out: Path) -> list[Path]:
        """Write a session into a folder that exists; return the files.

        Raises:
            ModuleNotFoundError: a package is missing; the message says how to install it.
            OSError: the folder cannot be written.
        """
        ...


_EXPORTERS: dict[str, Exporter] = {}


def register(exporter: Exporter) -> None:
    """Add a format.

    Raises:
        ValueError: there is one of this name.
    """
    if exporter.name in _EXPORTERS:
        raise ValueError(f"there is an exporter {exporter.name!r} already")
    _EXPORTERS[exporter.name] = exporter


def exporters() -> dict[str, Exporter]:
    """All formats by name."""
    from cortexloop.rig import xdream  # noqa: F401 - registers itself

    return dict(sorted(_EXPORTERS.items()))


def export(recording: Recording, to: str, out: Path) -> list[Path]:
    """Write a session in a format; return the files.

    Args:
        recording: the session.
        to: name of the format.
        out: folder, made if missing. Files of the same names are replaced.

    Raises:
        ValueError: an unknown format.
        ModuleNotFoundError, OSError: see `Exporter.write`.
    """
    known = exporters()
    if to not in known:
        raise ValueError(f"format should be one of {', '.join(known)}, got {to!r}")
    out.mkdir(parents=True, exist_ok=True)
    return known[to].write(recording, out)


class _Tables:
    """What the formats made of tables have in common: the tables, `session.json` and `codes.npz`."""

    name: str
    about: str

    def _check(self) -> None:
        """Raises ModuleNotFoundError where the format cannot be written."""

    def _write_table(self, table: Table, path: Path) -> None:
        raise NotImplementedError

    def write(self, recording: Recording, out: Path) -> list[Path]:
        """See `Exporter`."""
        self._check()
        written = []
        for table in tables(recording.history):
            path = out / f"{table.name}.{self.name}"
            with atomic_path(path) as temporary:
                self._write_table(table, temporary)
            written.append(path)
        return [*written, write_session(recording, out), *write_codes(recording, out)]


class CsvTables(_Tables):
    """Tables as text: numbers with all their digits, nothing for what is not known, true and false as 1 and 0."""

    name, about = "csv", "tables as .csv, codes as .npz, settings as .json"

    def _write_table(self, table: Table, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([name for name, _ in table.columns])
            writer.writerows([int(cell) if isinstance(cell, bool) else cell for cell in row] for row in table.rows())


class ParquetTables(_Tables):
    """Tables with typed columns."""

    name, about = "parquet", "tables as .parquet, codes as .npz, settings as .json"

    def _check(self) -> None:
        if importlib.util.find_spec("pyarrow") is None:
            raise ModuleNotFoundError('writing .parquet needs pyarrow: pip install "cortexloop[rig]", or write csv')

    def _write_table(self, table: Table, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        types: dict[Kind, Any] = {
            "text": pa.string(), "integer": pa.int64(), "real": pa.float64(), "truth": pa.bool_(),
        }  # fmt: skip
        names = [name for name, _ in table.columns]
        schema = pa.schema([(name, types[kind]) for name, kind in zip(names, table.kinds(), strict=True)])
        rows = table.rows()
        with pq.ParquetWriter(path, schema) as writer:
            while block := list(itertools.islice(rows, 1 << 16)):
                columns = zip(zip(*block, strict=True), schema, strict=True)
                arrays = [pa.array(_as_real(column) if field.type == pa.float64() else column, field.type)
                          for column, field in columns]  # fmt: skip
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def _as_real(column: tuple[Any, ...]) -> list[float | None]:
    return [None if value is None else float(value) for value in column]


class Pictures:
    """Every image once, named by the beginning of its checksum, as the tables have it."""

    name, about = "images", "every image as images/<first 16 digits of its sha>.png"

    def write(self, recording: Recording, out: Path) -> list[Path]:
        """See `Exporter`."""
        if recording.pixels is None:
            return []
        folder = out / "images"
        folder.mkdir(exist_ok=True)
        written = []
        for sha in recording.pixels.shas():
            written.append(folder / f"{sha[:16]}.png")
            write_png(written[-1], recording.pixels.get(sha))
        return written


def write_png(path: Path, image: NDArray[np.uint8]) -> None:
    """Write one image [H, W, 3]."""
    from PIL import Image

    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, "PNG", compress_level=1)


def write_session(recording: Recording, out: Path) -> Path:
    """Write session.json: the first record, with settings, sources and environment."""
    path = out / "session.json"
    document = msgspec.to_builtins(recording.start)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2), encoding="utf-8")
    return path


def write_codes(recording: Recording, out: Path) -> list[Path]:
    """Write codes.npz if there are codes: of each stream `<stream>` [images, dim] and `<stream>.items`, their names."""
    streams: dict[str, list[Any]] = {}
    for batch in recording.history.batches.values():
        if batch.codes_shape is not None and batch.made.stream is not None and batch.codes_dtype is not None:
            streams.setdefault(batch.made.stream, []).append(batch)
    if not streams:
        return []
    path = out / "codes.npz"
    with (
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        for stream, batches in streams.items():
            names = [item.item_id for batch in batches for item in batch.made.items if item.kind == "gen"]
            shape = (sum(batch.codes_shape[0] for batch in batches), *batches[0].codes_shape[1:])
            dtype = np.dtype(batches[0].codes_dtype)
            with _member(archive, stream, dtype, shape) as member:
                for record in recording.codes():
                    if record.stream == stream and record.codes is not None:
                        member.write(np.ascontiguousarray(record.codes.numpy(), dtype).tobytes())
            labels = np.array(names)
            with _member(archive, f"{stream}.items", labels.dtype, labels.shape) as member:
                member.write(labels.tobytes())
    return [path]


@contextlib.contextmanager
def _member(archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """A member of an .npz, opened for writing behind its header."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        yield member


register(CsvTables())
register(ParquetTables())
register(Pictures())

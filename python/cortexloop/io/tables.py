"""Write responses, images x models, row block by row block: memory does not grow with the number of images."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cortexloop.io.atomic import atomic_path

TABLE_SUFFIXES = (".npz", ".csv", ".parquet")

_CHUNK_BYTES = 1 << 24


class TableWriter(ABC):
    """Takes rows; made by `open_table`."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = tuple(columns)
        self.rows = 0

    def append(self, names: Sequence[str], values: NDArray[np.floating]) -> None:
        """Add rows.

        Args:
            names: one image name per row.
            values: [rows, columns], stored as float32.

        Raises:
            ValueError: another number of rows or columns.
            OSError: no space left.
        """
        if values.shape != (len(names), len(self.columns)):
            raise ValueError(f"values should have shape {[len(names), len(self.columns)]}, got {list(values.shape)}")
        self._append(names, np.ascontiguousarray(values, dtype=np.float32))
        self.rows += len(names)

    @abstractmethod
    def _append(self, names: Sequence[str], values: NDArray[np.float32]) -> None: ...

    @abstractmethod
    def finish(self) -> None:
        """Write what is still held back and close the file."""

    @abstractmethod
    def abandon(self) -> None:
        """Close the file after a failure."""


@contextlib.contextmanager
def open_table(path: str | os.PathLike[str], columns: Sequence[str]) -> Iterator[TableWriter]:
    """Open a table of float32 responses for writing; the file appears when the block ends without an exception.

    Args:
        path: the suffix chooses the format. `.npz`: `responses` float32 [images, models], `images`, `models` (names).
            `.csv`: a header `image,<model>,...`, one row per image, the nine digits that identify a float32.
            `.parquet`: a string column `image` and one float column per model (needs pyarrow).
        columns: names of the models, all different.

    Raises:
        ValueError: another suffix or names that are not all different.
        ModuleNotFoundError: `.parquet` without pyarrow.
        OSError: a missing folder, no permission, no space left; nothing of the file remains.
    """
    suffix = Path(path).suffix.lower()
    writers: dict[str, type[TableWriter]] = {".npz": _NpzTable, ".csv": _CsvTable, ".parquet": _ParquetTable}
    if suffix not in writers:
        raise ValueError(f"cannot write {str(path)!r}: expected a name that ends in {', '.join(TABLE_SUFFIXES)}")
    if len(set(columns)) != len(columns):
        twice = next(name for name in columns if list(columns).count(name) > 1)
        raise ValueError(f"the columns of a table need different names, got {twice!r} twice")
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ModuleNotFoundError('writing .parquet needs pyarrow: pip install "cortexloop[parquet]", or write .csv')
    with atomic_path(path) as temporary:
        table = writers[suffix](temporary, columns)  # type: ignore[call-arg, arg-type]
        try:
            yield table
            table.finish()
        except BaseException:
            table.abandon()
            raise


class _CsvTable(TableWriter):
    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        super().__init__(columns)
        self.file = path.open("w", newline="", encoding="utf-8")
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.writer.writerow(["image", *self.columns])

    def _append(self, names: Sequence[str], values: NDArray[np.float32]) -> None:
        self.writer.writerows(
            [name, *(f"{v:.9g}" for v in row)] for name, row in zip(names, values.tolist(), strict=True)
        )

    def finish(self) -> None:
        self.file.close()

    def abandon(self) -> None:
        _close_quietly(self.file)


class _NpzTable(TableWriter):
    """The header of an .npy holds the number of rows, which is known last (images may be skipped), and a zip cannot be
    patched afterwards. So rows wait in an unnamed file beside the destination and are copied behind the final header.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        super().__init__(columns)
        self.path = path
        self.values = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 - closed by finish() or abandon()
        self.names = tempfile.TemporaryFile("w+", dir=path.parent, encoding="utf-8")  # noqa: SIM115
        self.longest = 1

    def _append(self, names: Sequence[str], values: NDArray[np.float32]) -> None:
        self.values.write(values.data)
        for name in names:
            self.names.write(json.dumps(name) + "\n")  # escapes line breaks in names
            self.longest = max(self.longest, len(name))

    def finish(self) -> None:
        self.values.seek(0)
        self.names.seek(0)
        with zipfile.ZipFile(self.path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with _npy_member(archive, "responses", np.dtype("<f4"), (self.rows, len(self.columns))) as member:
                while block := self.values.read(_CHUNK_BYTES):
                    member.write(block)
            text = np.dtype(f"<U{self.longest}")
            with _npy_member(archive, "images", text, (self.rows,)) as member:
                for line in self.names:
                    member.write(np.array([json.loads(line)], text).tobytes())
            models = np.array(self.columns)
            with _npy_member(archive, "models", models.dtype, models.shape) as member:
                member.write(models.tobytes())
        self.abandon()

    def abandon(self) -> None:
        _close_quietly(self.values)
        _close_quietly(self.names)


@contextlib.contextmanager
def _npy_member(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> Iterator[IO[bytes]]:
    """A member of an .npz, opened for writing behind its .npy header."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        yield member


class _ParquetTable(TableWriter):
    """Rows are gathered to about 16 MB per row group; the footer grows with the number of groups."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        super().__init__(columns)
        self.pa = pa
        self.schema = pa.schema([("image", pa.string()), *((name, pa.float32()) for name in self.columns)])
        self.writer = pq.ParquetWriter(path, self.schema)
        self.group = max(1, _CHUNK_BYTES // (4 * max(1, len(self.columns))))
        self.held_names: list[str] = []
        self.held: list[NDArray[np.float32]] = []

    def _append(self, names: Sequence[str], values: NDArray[np.float32]) -> None:
        self.held_names.extend(names)
        self.held.append(values)
        if len(self.held_names) >= self.group:
            self._write_group()

    def _write_group(self) -> None:
        values = np.concatenate(self.held)
        arrays = [self.pa.array(self.held_names, self.pa.string())]
        arrays += [self.pa.array(np.ascontiguousarray(values[:, j])) for j in range(values.shape[1])]
        self.writer.write_table(self.pa.Table.from_arrays(arrays, schema=self.schema))
        self.held_names, self.held = [], []

    def finish(self) -> None:
        if self.held:
            self._write_group()
        self.writer.close()

    def abandon(self) -> None:
        _close_quietly(self.writer)


def _close_quietly(file: Any) -> None:
    """Close after a failure or a full copy; a second failure (the disk is still full) would hide the first."""
    with contextlib.suppress(OSError):
        file.close()

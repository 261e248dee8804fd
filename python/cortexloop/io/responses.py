"""Read recorded responses: one matrix of neurons x images, with the single repeats where they are at hand."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_AVERAGED = "repeat_averaged/"
_RAW = "raw/"


@dataclass(frozen=True, eq=False)
class Responses:
    """Recorded responses of one recording.

    Attributes:
        key: name of the recording (the `<session>` of the data pack), or the file's stem.
        values: float64 [neurons, images], averaged over repeats; NaN = missing. Units as recorded.
        raw: float64 [neurons, images, repeats] or None; NaN = repeat not shown.
        neurons: one name per row.
    """

    key: str
    values: NDArray[np.float64]
    raw: NDArray[np.float64] | None
    neurons: tuple[str, ...]


def load_responses(path: str | os.PathLike[str], key: str | None = None) -> Responses:
    """Load recorded responses.

    Args:
        path: .npz with `repeat_averaged/<key>` [neurons, images] and `raw/<key>` [neurons, images, repeats] (one of
            them is enough), or with arrays of any name and these shapes; .npy with one such array; .csv with a header
            of neuron names, one row per image, empty cells for missing values and optionally a first column of image
            names.
        key: which recording or array of an .npz; None: the only one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unreadable file, an unknown key, several recordings and no key, a wrong shape, nothing but NaN.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file of responses: {str(path)!r}")
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _from_npz(path, key)
    if key is not None:
        raise ValueError(f"only .npz files hold several recordings, so {str(path)!r} takes no key (got {key!r})")
    if suffix == ".npy":
        try:
            with path.open("rb") as file:  # np.load leaves a file of its own open when it is damaged
                array = np.lib.format.read_array(file, allow_pickle=False)
        except Exception as error:  # a damaged header makes NumPy's parser raise many kinds of exception
            raise ValueError(f"{str(path)!r} is no readable .npy file ({error})") from error
        return _responses(path.stem, array, None, repr(str(path)))
    if suffix == ".csv":
        return _from_csv(path)
    raise ValueError(f"{str(path)!r} is no file of responses: expected .npz, .npy or .csv")


def response_keys(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of the recordings in an .npz; empty for other files, which hold one without a name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unreadable .npz.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file of responses: {str(path)!r}")
    if path.suffix.lower() != ".npz":
        return ()
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = list(archive.files)
    except Exception as error:  # zipfile and NumPy raise many kinds of exception on damaged data
        raise ValueError(f"{str(path)!r} is no readable .npz file ({error})") from error
    return _recordings(names)


def _recordings(names: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.removeprefix(_AVERAGED).removeprefix(_RAW) for name in names))


def _from_npz(path: Path, key: str | None) -> Responses:
    keys = response_keys(path)
    if key is None:
        if len(keys) != 1:
            found = ", ".join(keys) or "none"
            raise ValueError(f"{str(path)!r} contains the recordings {found}: choose one by its key")
        key = keys[0]
    key = key.removeprefix(_AVERAGED).removeprefix(_RAW)
    if key not in keys:
        raise ValueError(f"{str(path)!r} has no recording {key!r}; it has {', '.join(keys) or 'none'}")
    where = f"recording {key!r} of {str(path)!r}"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            averaged = next((archive[name] for name in (_AVERAGED + key, key) if name in archive.files), None)
            raw = archive[_RAW + key] if _RAW + key in archive.files else None
    except Exception as error:  # zipfile and NumPy raise many kinds of exception on damaged data
        raise ValueError(f"{where} cannot be read ({error})") from error
    return _responses(key, averaged, raw, where)


def _from_csv(path: Path) -> Responses:
    where = repr(str(path))
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{where} is no readable .csv file ({error})") from error
    if len(rows) < 2:
        raise ValueError(f"{where} should have a header of neuron names and one row per image, got {len(rows)} rows")
    header, body = rows[0], rows[1:]
    first = 0 if _is_number(body[0][0]) and header[0].strip().lower() not in ("", "image", "images") else 1
    values = np.empty((len(body), len(header) - first))
    for i, row in enumerate(body):
        if len(row) != len(header):
            raise ValueError(f"{where} line {i + 2} should have {len(header)} cells like the header, got {len(row)}")
        for j, cell in enumerate(row[first:]):
            if not _is_number(cell):
                raise ValueError(f"{where} line {i + 2}, column {header[first + j]!r}: expected a number, got {cell!r}")
            values[i, j] = float(cell) if cell.strip() else np.nan
    responses = _responses(path.stem, values.T, None, where)
    return Responses(responses.key, responses.values, None, tuple(header[first:]))


def _is_number(cell: str) -> bool:
    """Numbers and empty cells (missing values)."""
    if not cell.strip():
        return True
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _responses(key: str, averaged: Array | None, raw: Array | None, where: str) -> Responses:
    for array in (averaged, raw):
        if array is not None and array.dtype.kind not in "fiu":
            raise ValueError(f"{where} should hold real numbers, got {array.dtype}")
    if averaged is not None and averaged.ndim == 3 and raw is None:
        averaged, raw = None, averaged
    repeats = None if raw is None else raw.astype(np.float64)
    if repeats is not None and repeats.ndim != 3:
        raise ValueError(f"{where} should have shape [neurons, images, repeats], got {list(repeats.shape)}")
    if averaged is None:
        assert repeats is not None
        values = _average(repeats)
    else:
        values = averaged.astype(np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(
            f"{where} should have shape [neurons, images] or [neurons, images, repeats], got {list(values.shape)}"
        )
    if repeats is not None and repeats.shape[:2] != values.shape:
        raise ValueError(f"{where}: raw {list(repeats.shape)} and repeat-averaged {list(values.shape)} do not match")
    if np.isinf(values).any():
        raise ValueError(f"{where} contains infinity; mark missing values with NaN")
    if np.isnan(values).all():
        raise ValueError(f"{where} contains nothing but NaN")
    return Responses(key, np.ascontiguousarray(values), repeats, tuple(f"neuron{k}" for k in range(len(values))))


def _average(raw: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the repeats that were shown, NaN where none was."""
    shown = np.isfinite(raw)
    counts = shown.sum(axis=2)
    sums = np.where(shown, raw, 0.0).sum(axis=2)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

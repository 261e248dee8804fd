"""Bring predictions and recordings together: which model belongs to which neuron, which image to which column."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cortexloop import io, metrics
from cortexloop.cli.console import BadInputError, bad_input


@dataclass(frozen=True, eq=False)
class Agreement:
    """How well each of N models predicts its recorded neuron. NaN where a model has no recorded neuron."""

    recording: str
    rows: tuple[int | None, ...]
    """Row of the recording that belongs to each model."""
    predicted: NDArray[np.float64]
    """[N, m] on the images that were compared."""
    recorded: NDArray[np.float64]
    """[N, m] averaged over repeats."""
    r: NDArray[np.float64]
    """[N] Pearson correlation."""
    corrected: NDArray[np.float64] | None
    """[N] noise-corrected R2 (r2_ER), None without single repeats."""
    where: str
    """Which images were compared, in words."""


def load_recording(path: Path, recording: str | None, images: Path) -> io.Responses:
    """The recording named, else the one whose name occurs in the name of the images, else the only one.

    Raises:
        BadInputError: an unreadable file, or no way to tell which recording is meant.
    """
    with bad_input():
        keys = io.response_keys(path)
        if recording is None and len(keys) > 1:
            named = [key for key in keys if key in images.stem]
            if len(named) != 1:
                raise BadInputError(
                    f"{str(path)!r} holds the recordings {', '.join(keys)}: choose one with --recording"
                )
            recording = named[0]
        return io.load_responses(path, recording)


def of_recording(names: Sequence[str], recording: str) -> list[str]:
    """The models `<recording>/...` (or with `_<recording>_` in their name) if there are any, else all."""
    own = [name for name in names if re.search(rf"(^|[/_]){re.escape(recording)}([/_]|$)", name)]
    return own or list(names)


def match_rows(names: Sequence[str], recording: io.Responses) -> tuple[int | None, ...]:
    """Row of each model: by equal name, else `...neuron<k>` is row k, else in order if the numbers agree.

    Raises:
        BadInputError: nothing matches.
    """
    position = {name: i for i, name in enumerate(recording.neurons)}
    n = len(recording.values)
    if all(name in position for name in names):
        return tuple(position[name] for name in names)
    numbers = [re.search(r"neuron(\d+)$", name) for name in names]
    if all(numbers):
        rows = [int(found[1]) for found in numbers if found]
        return tuple(row if row < n else None for row in rows)
    if len(names) == n:
        return tuple(range(n))
    raise BadInputError(
        f"cannot tell which of the {n} recorded neurons the {len(names)} models belong to: name models '...neuron<row>'"
    )


def match_columns(names: Sequence[str], total: int, columns: int) -> NDArray[np.int64]:
    """Column of each image: image number - 1 where all images are numbered within the recording, else their order.

    Args:
        names: of the images that were scored.
        total: number of images of the source, skipped ones included.
        columns: of the recording.

    Raises:
        BadInputError: neither fits.
    """
    numbers = [io.image_number(name) if Path(name).suffix else None for name in names]
    known = [number for number in numbers if number is not None]
    if len(known) == len(names) and len(set(known)) == len(known) and min(known) > 0 and max(known) <= columns:
        return np.array(known) - 1
    if all(name.isdecimal() for name in names) and total == columns:
        return np.array([int(name) for name in names])  # rows of an array file
    if len(names) == total == columns:
        return np.arange(columns)
    raise BadInputError(
        f"cannot tell which of the {columns} recorded responses the {total} images belong to: "
        "number the images from 1, or give as many images as were recorded"
    )


def compare(
    recording: io.Responses,
    models: Sequence[str],
    images: Sequence[str],
    predictions: NDArray[np.floating],
    *,
    total: int,
    held_out_from: int | None,
) -> Agreement:
    """Correlate predictions [images, N] with the recording.

    Raises:
        BadInputError: models or images that do not fit the recording.
    """
    rows = match_rows(models, recording)
    columns = match_columns(images, total, recording.values.shape[1])
    where = f"all {len(columns):,} images"
    if held_out_from is not None:
        kept = columns + 1 >= held_out_from
        if kept.sum() < 3:
            raise BadInputError(f"--held-out-from {held_out_from} leaves {int(kept.sum())} images to compare, too few")
        columns, predictions = columns[kept], predictions[kept]
        where = f"the {len(columns):,} images from number {held_out_from} on"
    x = np.ascontiguousarray(predictions.T, dtype=np.float64)
    chosen = np.array([0 if row is None else row for row in rows])
    missing = np.array([row is None for row in rows])
    y = np.where(missing[:, None], np.nan, recording.values[chosen][:, columns])
    corrected = None
    if recording.raw is not None:
        raw = np.where(missing[:, None, None], np.nan, recording.raw[chosen][:, columns])
        corrected = np.asarray(metrics.noise_corrected_r2(x, raw))
    return Agreement(recording.key, rows, x, y, np.asarray(metrics.pearson_r(x, y)), corrected, where)

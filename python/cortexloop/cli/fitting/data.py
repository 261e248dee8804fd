"""Images and responses brought together: who belongs to whom, what is missing, what is held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortexloop import io
from cortexloop.cli.console import BadInputError, bad_input, guarded
from cortexloop.cli.fitting.example import recorded
from cortexloop.cli.fitting.options import FitOptions
from cortexloop.cli.inputs import choose
from cortexloop.cli.recordings import load_recording, match_columns

Double = NDArray[np.float64]

LEAST = 10
"""Images that a fit needs at least, and half as many to be tested on."""


@dataclass(frozen=True)
class Excluded:
    """A neuron or an image that took no part, and why."""

    name: str
    reason: str


class Pictures:
    """The images of a fit, from a file or in memory, where they are `called` so; `batches` may be called again."""

    def __init__(self, source: io.ImageSource | NDArray[np.uint8], called: str = "procedural") -> None:
        self.source, self.called = source, called

    @property
    def size(self) -> tuple[int, int]:
        if isinstance(self.source, np.ndarray):
            return self.source.shape[1], self.source.shape[2]
        return self.source.height, self.source.width

    @property
    def names(self) -> list[str]:
        if isinstance(self.source, np.ndarray):
            return [f"{self.called} {i + 1}" for i in range(len(self.source))]
        return list(self.source.names)

    @property
    def skipped(self) -> list[io.SkippedImage]:
        return [] if isinstance(self.source, np.ndarray) else self.source.skipped

    def batches(self, n: int) -> Iterator[tuple[list[str], NDArray[Any]]]:
        """(names, uint8 [b, H, W, 3]). Raises BadInputError for an image that cannot be used."""
        if isinstance(self.source, np.ndarray):
            names = self.names
            for start in range(0, len(names), n):
                yield names[start : start + n], self.source[start : start + n]
        else:
            yield from guarded(self.source.batches(n))

    def pick(self, names: Sequence[str]) -> dict[str, NDArray[np.uint8]]:
        """The images of these names, read again."""
        wanted, found = set(names), {}
        for batch, pixels in self.batches(64):
            for name, one in zip(batch, pixels, strict=True):
                if name in wanted:
                    found[name] = np.array(one)
            if len(found) == len(wanted):
                break
        return found


@dataclass(frozen=True, eq=False)
class Recorded:
    """Responses of T neurons to N images.

    Attributes:
        responses: [N, T] averaged over repeats; NaN where nothing was recorded.
        raw: [T, N, repeats] or None.
        numbers: [N] number of each image in the recording, from 1.
        what: the recording in words.
    """

    names: tuple[str, ...]
    numbers: NDArray[np.int64]
    responses: Double
    raw: Double | None
    neurons: tuple[str, ...]
    excluded: tuple[Excluded, ...]
    dropped: tuple[Excluded, ...]
    what: str

    def rows(self, kept: NDArray[np.bool_]) -> Recorded:
        """Some of the images."""
        names = tuple(name for name, keep in zip(self.names, kept, strict=True) if keep)
        raw = None if self.raw is None else self.raw[:, kept]
        return Recorded(
            names, self.numbers[kept], self.responses[kept], raw, self.neurons, self.excluded, self.dropped, self.what
        )


def load_example(options: FitOptions) -> tuple[Pictures, Recorded]:
    """The built-in recording."""
    found = recorded(options.seed)
    chosen = choose(found.neurons, options.neurons, "neurons")
    rows = [found.neurons.index(name) for name in chosen]
    pictures = Pictures(found.images, "collage")
    raw = found.raw[rows]
    return pictures, Recorded(
        tuple(pictures.names), np.arange(len(found.images)) + 1, raw.mean(axis=2).T, raw, tuple(chosen), (), (),
        "textbook neurons with noise",
    )  # fmt: skip


def load_recorded(options: FitOptions, names: Sequence[str] | None, total: int) -> Recorded:
    """The recording, with the column of each image found, before anything is excluded.

    Args:
        names: of the images that can be used; None for features without images: one row per column.
        total: number of images of the source, skipped ones included.

    Raises:
        BadInputError: an unreadable file, or images and responses that cannot be matched.
    """
    assert options.responses is not None
    beside = options.images or options.features
    assert beside is not None
    recording = load_recording(options.responses, options.recording, beside)
    columns = recording.values.shape[1]
    if names is None:
        if total != columns:
            raise BadInputError(
                f"--features has {total:,} rows, one per image, and the recording {recording.key!r} has responses to "
                f"{columns:,} images: they should be as many"
            )
        names, order = [f"image {i + 1}" for i in range(columns)], np.arange(columns)
    else:
        order = match_columns(names, total, columns)
    chosen = choose(recording.neurons, options.neurons, "neurons")
    rows = [recording.neurons.index(name) for name in chosen]
    raw = None if recording.raw is None else recording.raw[rows][:, order]
    return Recorded(
        tuple(names), order + 1, recording.values[rows][:, order].T, raw, tuple(chosen), (), (), recording.key
    )


def settle_missing(found: Recorded, policy: str) -> tuple[Recorded, NDArray[np.bool_]]:
    """Without missing and constant responses.

    Images without any response are dropped. Of what is missing then, "neurons" leaves out the neurons, and
    "images" the images. Neurons with constant responses are left out.

    Returns:
        (what remains, [N] which images were kept).

    Raises:
        BadInputError: nothing remains.
    """
    responses = found.responses
    missing: NDArray[np.bool_] = np.isnan(responses)
    silent: NDArray[np.bool_] = np.asarray(missing.all(axis=0))
    excluded = [
        Excluded(name, "no response is recorded (all NaN)")
        for name, no in zip(found.neurons, silent, strict=True)
        if no
    ]
    if silent.all():
        raise BadInputError(f"nothing was recorded of the {len(found.neurons)} chosen neurons: all responses are NaN")
    gaps = missing[:, ~silent]
    lost: NDArray[np.bool_] = np.asarray(gaps.any(axis=1) if policy == "images" else gaps.all(axis=1))
    dropped = [
        Excluded(name, f"{int(gone.sum())} of {gone.size} responses are missing (NaN)")
        for name, gone, no in zip(found.names, gaps, lost, strict=True)
        if no
    ]
    kept = ~lost
    good = []
    for n, name in enumerate(found.neurons):
        if silent[n]:
            continue
        values = responses[kept, n]
        gone = int(np.isnan(values).sum())
        if gone:
            excluded.append(
                Excluded(
                    name,
                    f"{gone:,} of {len(values):,} responses are missing (NaN); --missing images leaves out images "
                    f"instead",
                )
            )
        elif len(values) and np.ptp(values) == 0:
            excluded.append(Excluded(name, f"its responses are constant ({values[0]:g})"))
        else:
            good.append(n)
    if not good:
        first = excluded[0]
        raise BadInputError(f"no neuron can be fitted; the first, {first.name!r}: {first.reason}")
    raw = None if found.raw is None else found.raw[good]
    names = tuple(found.neurons[n] for n in good)
    whole = Recorded(
        found.names, found.numbers, responses[:, good], raw, names,
        (*found.excluded, *excluded), (*found.dropped, *dropped), found.what,
    )  # fmt: skip
    return whole.rows(kept), kept


def split(found: Recorded, options: FitOptions) -> tuple[NDArray[np.int64], NDArray[np.int64], str]:
    """Positions of images to fit on and of those held out, and the rule in words.

    Raises:
        BadInputError: too few images on a side.
    """
    n = len(found.names)
    if options.held_out_from is not None:
        test = found.numbers >= options.held_out_from
        rule = f"images from number {options.held_out_from} on"
    else:
        fraction = 0.2 if options.held_out is None else options.held_out
        test = np.zeros(n, bool)
        test[np.random.default_rng(options.seed).permutation(n)[: round(fraction * n)]] = True
        rule = f"{100 * fraction:g} % of the images, chosen at random (seed {options.seed})"
    fit, held = np.flatnonzero(~test), np.flatnonzero(test)
    if len(fit) < LEAST or len(held) < LEAST // 2:
        raise BadInputError(
            f"of {n:,} images {len(fit):,} remain to fit on and {len(held):,} are held out: "
            f"at least {LEAST} and {LEAST // 2} are needed"
        )
    return fit, held, rule


def open_images(path: Path, size: tuple[int, int] | None, *, resize: bool, skip_bad: bool) -> Pictures:
    """The images of a folder, zip or array file. Raises BadInputError."""
    with bad_input():
        return Pictures(io.open_images(path, size=size, resize=resize, on_error="skip" if skip_bad else "raise"))


def without_constant(found: Recorded, fit: NDArray[np.int64]) -> Recorded:
    """Without neurons whose responses are constant over the images to fit on. Raises BadInputError if none is left."""
    good = np.ptp(found.responses[fit], axis=0) > 0
    if good.all():
        return found
    constant = [
        Excluded(name, "its responses to the images to fit on are constant")
        for name, ok in zip(found.neurons, good, strict=True)
        if not ok
    ]
    if not good.any():
        raise BadInputError(f"no neuron can be fitted: {constant[0].reason}")
    return Recorded(
        found.names, found.numbers, found.responses[:, good], None if found.raw is None else found.raw[good],
        tuple(name for name, ok in zip(found.neurons, good, strict=True) if ok),
        (*found.excluded, *constant), found.dropped, found.what,
    )  # fmt: skip

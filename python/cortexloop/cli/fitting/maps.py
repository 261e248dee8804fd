"""Feature maps of all images of a fit, computed by a source or read from a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cortexloop.cli.console import BadInputError, bad_input, progress
from cortexloop.cli.fitting.data import Pictures
from cortexloop.cli.sources import OpenSource

SHARE = 0.5
"""Of the free memory that feature maps may take; the fit needs some beside them."""


@dataclass(frozen=True, eq=False)
class Maps:
    """Features of N images.

    Attributes:
        values: float32 [N, C, H, W].
        average: the mean image, uint8 [h, w, 3]; None without images.
    """

    values: Tensor
    average: NDArray[np.uint8] | None


def compute(opened: OpenSource, pictures: Pictures, names: Sequence[str], *, quiet: bool) -> Maps:
    """Features of the images of these names, in the order in which they come.

    Raises:
        BadInputError: an image that cannot be used, or more maps than fit in memory.
    """
    source = opened.source
    shape = source.feature_shape()
    device = _room(len(names), shape, source.device)
    values = torch.empty((len(names), *shape), dtype=torch.float32, device=device)
    total = np.zeros((*pictures.size, 3))
    wanted, row = set(names), 0
    with progress("computing features", len(names), quiet=quiet) as bar:
        for batch, pixels in pictures.batches(source.batch):
            chosen = [i for i, name in enumerate(batch) if name in wanted]
            if not chosen:
                continue
            part = pixels if len(chosen) == len(batch) else pixels[chosen]
            with bad_input():
                values[row : row + len(chosen)] = source(part)
            total += part.sum(axis=0, dtype=np.float64)
            row += len(chosen)
            bar.advance(len(chosen))
    _refuse_nan(values, f"the features of {source.name}")
    return Maps(values, np.rint(total / max(row, 1)).astype(np.uint8))


def read(path: Path) -> NDArray[np.generic]:
    """The array of a file of features, [N, C, H, W]; .npy files are not read yet, only mapped.

    Raises:
        BadInputError: an unreadable file, several arrays of which none is called "features", another shape or type.
    """
    where = repr(str(path))
    if path.suffix.lower() not in (".npy", ".npz"):
        raise BadInputError(f"--features should be an .npy or .npz file, got {where}")
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            with np.load(path, allow_pickle=False) as archive:
                names = archive.files
                name = "features" if "features" in names else names[0] if len(names) == 1 else None
                if name is None:
                    raise BadInputError(f"{where} holds the arrays {', '.join(names)}: call one of them 'features'")
                array = archive[name]
    except BadInputError:
        raise
    except FileNotFoundError as error:
        raise BadInputError(f"no such file of features: {where}") from error
    except Exception as error:  # damaged files make NumPy and zipfile raise many kinds of exception
        raise BadInputError(f"{where} is no readable file of features ({error})") from error
    if array.ndim == 2:
        array = array[:, :, None, None]
    if array.ndim != 4 or array.dtype.kind != "f" or not array.size:
        raise BadInputError(
            f"{where} should hold floating maps [images, channels, height, width] (or [images, features]), got "
            f"{array.dtype} {list(array.shape)}"
        )
    found: NDArray[np.generic] = array
    return found


def take(array: NDArray[np.generic], rows: NDArray[np.int64], device: torch.device, where: Path) -> Maps:
    """Rows of an array of features as tensors. Raises BadInputError: NaN, or more than fits in memory."""
    shape = (int(array.shape[1]), int(array.shape[2]), int(array.shape[3]))
    place = _room(len(rows), shape, device)
    values = torch.empty((len(rows), *shape), dtype=torch.float32, device=place)
    for start in range(0, len(rows), 64):
        part = np.ascontiguousarray(array[rows[start : start + 64]], dtype=np.float32)
        values[start : start + len(part)] = torch.from_numpy(part)
    _refuse_nan(values, repr(str(where)))
    return Maps(values, None)


def _refuse_nan(values: Tensor, what: str) -> None:
    if bool(torch.isfinite(values.sum(dtype=torch.float64))):  # NaN and infinity do not get lost in a sum
        return
    bad = [i for i in range(len(values)) if not bool(torch.isfinite(values[i]).all())]
    if bad:
        raise BadInputError(f"{what} hold NaN or infinity in image {bad[0] + 1} and {len(bad) - 1} others")


def _room(count: int, shape: tuple[int, int, int], device: torch.device) -> torch.device:
    """Where the maps are kept: on their device, else in host memory. Raises BadInputError: they fit nowhere."""
    needed = 4 * count * shape[0] * shape[1] * shape[2]
    if device.type == "cuda" and needed <= SHARE * torch.cuda.mem_get_info(device)[0]:
        return device
    free = _free_memory()
    if free is not None and needed > SHARE * free:
        raise BadInputError(
            f"the features of {count:,} images, {' x '.join(map(str, shape))} each, take {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB of memory are free: take a later layer, or fewer images"
        )
    return torch.device("cpu")


def _free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(errors="replace").splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None

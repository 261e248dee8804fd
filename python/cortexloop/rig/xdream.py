"""A session as XDREAM leaves it: `block000_000_<item>.png` for each image, `block000.mat` and `.h5` for the responses.

XDREAM (Xiao and Kreiman 2020, PLoS Comput. Biol. 16(6); Ponce et al. 2019, Cell 177) and the code around it read
image names from the cell array `stimulusID` and responses [images, channels], as HDF5 has it, from `tEvokedResp`; or
`scores` [images, channels] and `indices` into the sorted names of the block's images. A block is a batch.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cortexloop.io import atomic_path
from cortexloop.rig.export import register, write_codes, write_png, write_session
from cortexloop.rig.history import BatchHistory, History, Recording

__all__ = ["XdreamFiles", "image_name", "write_mat"]


def image_name(block: int, position: int, item_id: str) -> str:
    """Name of the image file of an item, by the number of its batch and its place there; never that of a folder."""
    return f"block{block:03d}_{position:03d}_{re.sub(r'[^A-Za-z0-9._-]', '_', item_id)}.png"


class XdreamFiles:
    """Exporter: see the module."""

    name, about = "xdream", "blocks of .png, .mat and .h5 as XDREAM has them, codes as .npz"

    def write(self, recording: Recording, out: Path) -> list[Path]:
        """See `Exporter`."""
        if importlib.util.find_spec("h5py") is None:
            raise ModuleNotFoundError('writing .mat and .h5 needs h5py: pip install "cortexloop[rig]"')
        units = all_units(recording.history)
        written = []
        for batch in recording.history.batches.values():
            written += _write_images(recording, batch, out)
            block = f"block{batch.state.number:03d}"
            names, responses = rows(recording.history, batch, units)
            if not names:
                continue
            in_order = {name: i for i, name in enumerate(sorted(image_names(batch)))}
            with atomic_path(out / f"{block}.mat") as temporary:
                write_mat(temporary, names, responses, units)
            with atomic_path(out / f"{block}.h5") as temporary:
                _write_h5(temporary, [in_order[name] for name in names], responses, units)
            written += [out / f"{block}.mat", out / f"{block}.h5"]
        return [*written, write_session(recording, out), *write_codes(recording, out)]


def image_names(batch: BatchHistory) -> list[str]:
    """Names of the image files of a batch, in the order of its items."""
    return [image_name(batch.state.number, i, item.item_id) for i, item in enumerate(batch.made.items)]


def all_units(history: History) -> list[str]:
    """Names of all units that were ever told, in the order in which they came."""
    return list(dict.fromkeys(unit for told in history.tells for unit in told.header.units))


def rows(history: History, batch: BatchHistory, units: Sequence[str]) -> tuple[list[str], NDArray[np.float64]]:
    """The responses of a batch that count, one row for each presentation.

    Returns:
        File names of the images, responses [rows, units] with NaN for units that were not told.
    """
    column = {unit: i for i, unit in enumerate(units)}
    every = image_names(batch)
    names, found = [], []
    for pres, index in zip(batch.made.pres_ids, batch.made.order, strict=True):
        tag = batch.state.told.get(pres)
        if tag is None:
            continue
        told = history.tells[int(tag[0])]
        values = np.full(len(units), np.nan)
        values[[column[unit] for unit in told.header.units]] = told.responses.numpy()[int(tag[1])]
        names.append(every[index])
        found.append(values)
    return names, np.array(found).reshape(len(found), len(units))


def _write_images(recording: Recording, batch: BatchHistory, out: Path) -> list[Path]:
    if recording.pixels is None:
        return []
    written = []
    for name, sha in zip(image_names(batch), batch.made.shas, strict=False):
        if recording.pixels.has(sha):
            path = out / name
            write_png(path, recording.pixels.get(sha))
            written.append(path)
    return written


def write_mat(path: Path, names: Sequence[str], responses: NDArray[np.float64], units: Sequence[str]) -> None:
    """Write a MAT-file of version 7.3, which is HDF5 behind a header of 512 bytes.

    In MATLAB, `stimulusID` is a cell [rows, 1] of text, `tEvokedResp` is [units, rows], `units` is a cell [units, 1].

    Args:
        path: of the file.
        names: of the image of each row.
        responses: [rows, units].
        units: their names.
    """
    import h5py

    with h5py.File(path, "w", userblock_size=512) as file:
        group = file.create_group("#refs#")
        _write_cell(file, group, "stimulusID", names)
        _write_cell(file, group, "units", units)
        file.create_dataset("tEvokedResp", data=responses).attrs["MATLAB_class"] = np.bytes_("double")
    header = b"MATLAB 7.3 MAT-file, Platform: cortexloop, Created by: cortexloop HDF5 schema 1.00 .".ljust(116)
    with path.open("r+b") as raw:
        raw.write(header + bytes(8) + b"\x00\x02IM")


def _write_cell(file: Any, group: Any, name: str, texts: Sequence[str]) -> None:
    import h5py

    references = np.empty((1, len(texts)), h5py.ref_dtype)
    for i, text in enumerate(texts):
        # MATLAB keeps text as UTF-16, and arrays in the other order.
        letters = np.frombuffer(text.encode("utf-16-le"), np.uint16).reshape(-1, 1)
        dataset = group.create_dataset(f"{name}{i}", data=letters)
        dataset.attrs["MATLAB_class"] = np.bytes_("char")
        dataset.attrs["MATLAB_int_decode"] = np.int32(2)
        references[0, i] = dataset.ref
    file.create_dataset(name, data=references, dtype=h5py.ref_dtype).attrs["MATLAB_class"] = np.bytes_("cell")


def _write_h5(path: Path, indices: Sequence[int], responses: NDArray[np.float64], units: Sequence[str]) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file["scores"] = responses
        file["indices"] = np.array(indices, np.int64)
        file["units"] = np.array([unit.encode() for unit in units], np.bytes_)


register(XdreamFiles())

"""Named arrays with a JSON header in one safetensors file; nothing in it can run code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from cortexloop.io.atomic import atomic_path

Arrays = dict[str, NDArray[Any]]


def save_arrays(path: str | os.PathLike[str], kind: str, arrays: Mapping[str, NDArray[Any]], header: Any) -> None:
    """Write arrays and a header, atomically.

    Args:
        kind: what the file is and its version; `load_arrays` insists on it.
        header: anything JSON-able.

    Raises:
        OSError: the file cannot be written; an older one is untouched.
    """
    metadata = {"format": kind, "header": json.dumps(header)}
    with atomic_path(path) as temporary:
        safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary, metadata)


def load_arrays(path: str | os.PathLike[str], kind: str) -> tuple[Arrays, Any]:
    """The arrays, copies in memory, and the header of a file that `save_arrays` wrote with this `kind`.

    Raises:
        ValueError: damaged, or of another kind. OSError: the file cannot be read.
    """
    Path(path).stat()  # an OSError of its own kind, rather than the library's
    try:
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise ValueError(f"its format is {metadata.get('format')!r}, expected {kind!r}")
            header = json.loads(metadata["header"])
            return {name: np.array(file.get_tensor(name)) for name in file.keys()}, header  # noqa: SIM118 - no dict
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)!r} cannot be used: {error}") from error

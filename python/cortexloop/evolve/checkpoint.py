"""Checkpoints of an evolution: one file with the tensors, and settings and counters as JSON in its header."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cortexloop import io

if TYPE_CHECKING:
    from cortexloop.evolve.evolution import Generation

KIND = "cortexloop-evolution-1"
_TRACES = ("scores", "clean", "reference_scores", "code_norm")


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's shape and bytes."""
    found = hashlib.sha256(repr(list(tensor.shape)).encode())
    found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def save(
    path: str | os.PathLike[str], settings: dict[str, Any], state: dict[str, Any], history: Sequence[Generation]
) -> None:
    """Write a checkpoint, atomically.

    Raises:
        OSError: the file cannot be written; an older one is untouched.
    """
    arrays = {f"optimiser/{name}": tensor.cpu().numpy() for name, tensor in state["tensors"].items()}
    for generation in history:
        for name in _TRACES:
            values = getattr(generation, name)
            if values is not None:
                arrays[f"history/{generation.index:06d}/{name}"] = values
    header = {
        "settings": settings,
        "state": {key: value for key, value in state.items() if key != "tensors"},
        "seconds": [generation.seconds for generation in history],
    }
    io.save_arrays(path, KIND, arrays, header)


def load(path: str | os.PathLike[str], settings: dict[str, Any]) -> tuple[dict[str, Any], list[Generation]]:
    """The optimiser's state and the history of a checkpoint whose settings are these.

    Raises:
        ValueError: not a checkpoint, or other settings; the message names the first difference.
        OSError: the file cannot be read.
    """
    from cortexloop.evolve.evolution import Generation

    arrays, header = io.load_arrays(path, KIND)
    try:
        _refuse_other_settings(header["settings"], json.loads(json.dumps(settings)))
        state = dict(header["state"])
        state["tensors"] = {
            name.removeprefix("optimiser/"): torch.from_numpy(array)
            for name, array in arrays.items()
            if name.startswith("optimiser/")
        }
        history = [
            Generation(
                index=index,
                seconds=seconds,
                scores=arrays[f"history/{index:06d}/scores"],
                clean=arrays.get(f"history/{index:06d}/clean"),
                reference_scores=arrays.get(f"history/{index:06d}/reference_scores"),
                code_norm=arrays[f"history/{index:06d}/code_norm"],
            )
            for index, seconds in enumerate(header["seconds"])
        ]
    except KeyError as error:
        raise ValueError(f"{os.fspath(path)!r} is not a complete checkpoint: {error} is missing") from error
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} belongs to another run: {error}") from error
    return state, history


def _refuse_other_settings(theirs: Any, ours: Any, name: str = "") -> None:
    """Raise at the first place where two nested settings differ.

    Raises:
        ValueError: they differ.
    """
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted(theirs.keys() | ours.keys()):
            _refuse_other_settings(theirs.get(key), ours.get(key), f"{name}.{key}" if name else key)
    elif theirs != ours:
        raise ValueError(f"its {name} is {theirs!r:.120}, here it is {ours!r:.120}")

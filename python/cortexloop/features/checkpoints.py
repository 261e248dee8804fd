"""Weights of adversarially robust networks."""

from __future__ import annotations

import os
import pickle
from typing import Any

import torch
from torch import Tensor, nn

_PREFIXES = ("module.model.", "model.", "module.", "")


def load_robust_checkpoint(
    module: nn.Module, path: str | os.PathLike[str]
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Load a checkpoint of the "robustness" package (Engstrom et al. 2019) into a plain network.

    Such a file holds the network's state under "model" (or "state_dict"), its names behind "module.model.", beside an
    attacker's copy and the normaliser. Read with weights_only=True: a file cannot run code here.

    Args:
        module: a network with the names and shapes of the file, such as torchvision's resnet50. Its weights are
            replaced and it is put into evaluation mode.
        path: the file.

    Returns:
        Mean and standard deviation of the file's normaliser, R, G, B in units of 0..1, as `Preprocess` takes them; None
        if it has none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, or other names or shapes than the module's.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{os.fspath(path)} is no checkpoint of plain tensors: {reason}") from error
    state = _state(content, path)
    wanted = module.state_dict()
    # Files from before torch 0.4.1 have no counters of batches; they do not matter in evaluation mode.
    needed = {key for key in wanted if not key.endswith("num_batches_tracked")}
    prefix = max(_PREFIXES, key=lambda p: sum(p + key in state for key in needed))
    missing = sorted(key for key in needed if prefix + key not in state)
    if missing:
        raise ValueError(
            f"{os.fspath(path)} lacks {len(missing)} of the {len(needed)} tensors of {type(module).__name__}, such as "
            f"{missing[0]!r}; its names start with {', '.join(map(repr, list(state)[:3]))}"
        )
    own = {key: state.get(prefix + key, wanted[key]) for key in wanted}
    wrong = [key for key in wanted if own[key].shape != wanted[key].shape]
    if wrong:
        raise ValueError(
            f"{os.fspath(path)} holds {wrong[0]!r} as {list(own[wrong[0]].shape)}, {type(module).__name__} has "
            f"{list(wanted[wrong[0]].shape)}"
        )
    # The module's own prefix, so that names inside of it that it lacks are noticed (another, larger network).
    extra = [key for key in state if prefix and key.startswith(prefix) and key[len(prefix) :] not in wanted]
    extra = [key for key in extra if not key.startswith(("module.attacker.", "module.normalizer."))]
    if extra:
        raise ValueError(f"{os.fspath(path)} holds {extra[0]!r}, which {type(module).__name__} does not have")
    module.load_state_dict(own)
    module.eval()
    mean, std = (_find(state, name) for name in ("normalizer.new_mean", "normalizer.new_std"))
    return None if mean is None or std is None else (_triple(mean), _triple(std))


def _state(content: Any, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The network's tensors by name."""
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{os.fspath(path)} holds no dictionary of tensors, alone or under 'model' or 'state_dict'")
    return content


def _find(state: dict[str, Tensor], ending: str) -> Tensor | None:
    return next((value for key, value in state.items() if key.endswith(ending)), None)


def _triple(values: Tensor) -> tuple[float, ...]:
    return tuple(float(v) for v in values.double().flatten())

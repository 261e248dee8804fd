"""cortexloop: banks of compact models of visual neurons, evaluated together, for closed-loop neuroscience.

    import cortexloop as cl
    bank = cl.ModelBank.load("models.safetensors")
    scores = cl.responses(images, bank)                        # uint8 [B, H, W, 3] -> float32 [B, N]
    uphill = cl.input_gradient(images, bank, np.ones_like(scores))

Submodules `attribution`, `evolve`, `factor`, `features`, `io`, `metrics`, `models`, `readouts`, `regression`, `rig`,
`screening`, `synthesis` and `testing` are imported when first used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from cortexloop.bank import ModelBank
from cortexloop.functional import (
    activations,
    explain,
    get_num_threads,
    input_gradient,
    responses,
    set_num_threads,
    stream_responses,
    use_backend,
)
from cortexloop.images import recenter, to_pixels
from cortexloop.ops import BackendError, BackendWarning, Explanation
from cortexloop.realtime import Plan
from cortexloop.weights import IMAGE_MEAN, CompactWeights, LayerWeights

_LAZY = (
    "attribution",
    "evolve",
    "factor",
    "features",
    "io",
    "metrics",
    "models",
    "readouts",
    "regression",
    "rig",
    "screening",
    "synthesis",
    "testing",
)

__all__ = [
    "IMAGE_MEAN",
    "BackendError",
    "BackendWarning",
    "CompactWeights",
    "Explanation",
    "LayerWeights",
    "ModelBank",
    "Plan",
    "__version__",
    "activations",
    "explain",
    "get_num_threads",
    "input_gradient",
    "recenter",
    "responses",
    "set_num_threads",
    "stream_responses",
    "to_pixels",
    "use_backend",
]


def _version() -> str:
    try:
        return importlib.metadata.version("cortexloop")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"  # run from a source checkout that was never installed


__version__ = _version()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"cortexloop.{name}")
    raise AttributeError(f"module 'cortexloop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

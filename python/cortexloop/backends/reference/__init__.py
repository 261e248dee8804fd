"""Plain torch: any device, float64 too, and what every other backend is compared with."""

from __future__ import annotations

import torch

from cortexloop.backends.reference.bank import BankOperators
from cortexloop.backends.reference.evolution import CodeOperators
from cortexloop.backends.reference.lasso import LassoOperators
from cortexloop.backends.reference.moments import MomentOperators
from cortexloop.backends.reference.nmf import NmfOperators
from cortexloop.backends.reference.pullback import PullbackOperators
from cortexloop.backends.reference.readout import ReadoutOperators
from cortexloop.backends.registry import Problem

_IMAGES = ("images", (torch.uint8, torch.float32, torch.float64))

_TAKES: dict[str, tuple[str, tuple[torch.dtype, ...]]] = {
    "bank_forward": _IMAGES,
    "bank_input_gradient": _IMAGES,
    "bank_pullback": _IMAGES,
    "sample_codes": ("codes", (torch.float32, torch.float64)),
    "feature_moments": ("features", (torch.float16, torch.bfloat16, torch.float32, torch.float64)),
    "factorized_readout": ("features", (torch.float32, torch.float64)),
    "point_readout": ("features", (torch.float32, torch.float64)),
    "nmf": ("matrices", (torch.float32, torch.float64)),
    "lasso_path": ("Gram matrices", (torch.float64,)),
}
"""What each operator works on, and its dtypes."""


class ReferenceBackend(
    BankOperators, CodeOperators, PullbackOperators, MomentOperators, LassoOperators, NmfOperators, ReadoutOperators
):
    """Plain torch; takes everything."""

    name = "reference"

    def unsupported(self, problem: Problem) -> str | None:
        what, taken = _TAKES[problem.op]
        if problem.dtype in taken:
            return None
        names = [str(dtype).removeprefix("torch.") for dtype in (*taken, problem.dtype)]
        return f"{what} should be {', '.join(names[:-2])} or {names[-2]}, these are {names[-1]}"

    def note(self, problem: Problem) -> str | None:
        return "plain torch" + (': "fast" runs exactly' if problem.precision == "fast" else "")


BACKEND = ReferenceBackend()

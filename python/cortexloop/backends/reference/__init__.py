"""Plain torch: any device, float64 too, and what every other backend is compared with."""

from __future__ import annotations

import torch

from cortexloop.backends.reference.bank import BankOperators
from cortexloop.backends.reference.evolution import CodeOperators
from cortexloop.backends.registry import Problem


class ReferenceBackend(BankOperators, CodeOperators):
    """Plain torch; takes everything."""

    name = "reference"

    def unsupported(self, problem: Problem) -> str | None:
        codes = problem.op == "sample_codes"
        taken = (torch.float32, torch.float64) if codes else (torch.uint8, torch.float32, torch.float64)
        if problem.dtype in taken:
            return None
        names = [str(dtype).removeprefix("torch.") for dtype in (*taken, problem.dtype)]
        what = "codes" if codes else "images"
        return f"{what} should be {', '.join(names[:-2])} or {names[-2]}, these are {names[-1]}"

    def note(self, problem: Problem) -> str | None:
        return "plain torch" + (': "fast" runs exactly' if problem.precision == "fast" else "")


BACKEND = ReferenceBackend()

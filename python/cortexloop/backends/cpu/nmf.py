"""Non-negative factorization on the CPU: each matrix by one thread, from its start to its end."""

from __future__ import annotations

import torch
from torch import Tensor

from cortexloop._native import nmf
from cortexloop.backends.registry import Problem


class NmfOperators:
    """Coordinate descent in host memory, float32."""

    def nmf_unsupported(self, problem: Problem) -> str | None:
        """None = can run; else one sentence for people."""
        if problem.device != "cpu":
            return f"the C++ kernels work in host memory, the matrices are on {problem.device}"
        if problem.dtype != torch.float32:
            return f"the C++ kernels take float32, these are {str(problem.dtype).removeprefix('torch.')}"
        return None

    def nmf(
        self,
        matrices: Tensor,
        w: Tensor,
        h: Tensor,
        signed: bool,
        l1: tuple[float, float],
        l2: tuple[float, float],
        tolerance: float,
        max_iterations: int,
    ) -> Tensor:
        iterations = torch.zeros(len(matrices), dtype=torch.int64)
        nmf.nmf(matrices, w, h, signed, l1, l2, tolerance, max_iterations, iterations)
        return iterations

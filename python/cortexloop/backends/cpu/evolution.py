"""Populations of codes on the CPU: allocate the outputs, hand the addresses to C++."""

from __future__ import annotations

import torch
from torch import Tensor

from cortexloop import _native
from cortexloop.backends.registry import Problem


class CodeOperators:
    """Operators on populations of codes, float32 in host memory."""

    def codes_unsupported(self, problem: Problem) -> str | None:
        """None = can run; else one sentence for people."""
        if problem.device != "cpu":
            return f"the C++ kernels work in host memory, the codes are on {problem.device}"
        if problem.dtype != torch.float32:
            return f"the C++ kernels take float32 codes, these are {str(problem.dtype).removeprefix('torch.')}"
        return None

    def random_rows(
        self, normal: bool, seed: int, stream: int, step: int, problems: Tensor, rows: int, columns: int
    ) -> Tensor:
        out = torch.empty(problems.shape[0], rows, columns)
        _native.random_rows(normal, seed, stream, step, problems, out)
        return out

    def sample_codes(
        self,
        seed: int,
        stream: int,
        step: int,
        problems: Tensor,
        rows: int,
        mean: Tensor,
        scale: Tensor,
        diagonal: Tensor | None,
        factors: tuple[Tensor, Tensor] | None,
        out: Tensor | None,
    ) -> Tensor:
        if out is None:
            out = torch.empty(mean.shape[0], rows, mean.shape[1])
        _native.sample_codes(seed, stream, step, problems, mean, scale, diagonal, factors, out)
        return out

    def code_moments(self, codes: Tensor, weights: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor | None]:
        first = torch.empty(codes.shape[0], codes.shape[2])
        second = None if centre is None else torch.empty_like(first)
        _native.code_moments(codes, weights, centre, first, second)
        return first, second

    def low_rank_product(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        out = torch.empty_like(x)
        _native.low_rank_product(x, left, right, out)
        return out

    def row_dots(self, x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty(x.shape[0])
        _native.row_dots(x, y, out)
        return out

"""Readouts of feature maps on the CPU: allocate the outputs, hand the addresses to C++."""

from __future__ import annotations

import torch
from torch import Tensor

from cortexloop._native import readout
from cortexloop.backends.registry import Gradients, Problem, Wanted


def _outputs(inputs: tuple[Tensor, Tensor, Tensor], wanted: Wanted) -> Gradients:
    features, second, third = (torch.empty_like(x) if w else None for x, w in zip(inputs, wanted, strict=True))
    return features, second, third


class ReadoutOperators:
    """Features, masks, vectors and positions in float32 in host memory."""

    def readout_unsupported(self, problem: Problem) -> str | None:
        """None = can run; else one sentence for people."""
        if problem.device != "cpu":
            return f"the C++ kernels work in host memory, the features are on {problem.device}"
        if problem.dtype != torch.float32:
            return f"the C++ kernels take float32 features, these are {str(problem.dtype).removeprefix('torch.')}"
        return None

    def factorized_readout(self, features: Tensor, masks: Tensor, vectors: Tensor) -> Tensor:
        out = torch.empty(features.shape[0], masks.shape[0])
        readout.factorized_readout(features, masks, vectors, out)
        return out

    def factorized_readout_gradient(
        self, features: Tensor, masks: Tensor, vectors: Tensor, cotangent: Tensor, wanted: Wanted
    ) -> Gradients:
        out = _outputs((features, masks, vectors), wanted)
        readout.factorized_readout_gradient(features, masks, vectors, cotangent, *out)
        return out

    def point_readout(self, features: Tensor, positions: Tensor, vectors: Tensor, align_corners: bool) -> Tensor:
        out = torch.empty(features.shape[0], vectors.shape[0])
        readout.point_readout(features, positions, vectors, align_corners, out)
        return out

    def point_readout_gradient(
        self,
        features: Tensor,
        positions: Tensor,
        vectors: Tensor,
        align_corners: bool,
        cotangent: Tensor,
        wanted: Wanted,
    ) -> Gradients:
        out = _outputs((features, positions, vectors), wanted)
        readout.point_readout_gradient(features, positions, vectors, align_corners, cotangent, *out)
        return out

"""Streaming moments on a GPU: one launch per batch, which updates its arguments in place."""

from __future__ import annotations

from torch import Tensor

from cortexloop import _device, _native
from cortexloop._native import gpu, moments_gpu
from cortexloop._native.moments import FEATURE_CODES
from cortexloop.backends.registry import Problem


class MomentOperators:
    """A batch of float32, float16 or bfloat16 features in GPU memory joins running moments."""

    def moments_unsupported(self, problem: Problem) -> str | None:
        reason = _native.cuda_unavailable()
        if reason:
            return reason
        if problem.device != gpu.device_type():
            return f"the CUDA kernels work in GPU memory, the features are on {problem.device}"
        if problem.dtype not in FEATURE_CODES:
            dtype = str(problem.dtype).removeprefix("torch.")
            return f"the CUDA kernels take float32, float16 and bfloat16 features, these are {dtype}"
        return gpu.device_unsupported(problem.index)

    def moments_note(self, problem: Problem) -> str | None:
        return f"{gpu.devices()[problem.index]['name']}; products of tf32 pairs, as accurate as float32"

    def feature_moments(
        self,
        features: Tensor,
        weights: Tensor | None,
        centred: Tensor,
        shift: Tensor,
        before: float,
        batch: float,
        mean: Tensor,
        m2: Tensor,
        cross: Tensor,
    ) -> None:
        with _device.selected(features.device):
            moments_gpu.feature_moments(features, weights, centred, shift, before, batch, mean, m2, cross)

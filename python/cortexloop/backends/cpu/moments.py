"""Running moments of features on the CPU: addresses for the C++ kernel."""

from __future__ import annotations

from torch import Tensor

from cortexloop._native import moments
from cortexloop.backends.registry import Problem


class MomentOperators:
    """Features in float32, float16 or bfloat16 in host memory."""

    def moments_unsupported(self, problem: Problem) -> str | None:
        """None = can run; else one sentence for people."""
        if problem.device != "cpu":
            return f"the C++ kernels work in host memory, the features are on {problem.device}"
        if problem.dtype not in moments.FEATURE_CODES:
            dtype = str(problem.dtype).removeprefix("torch.")
            return f"the C++ kernels take float32, float16 and bfloat16 features, these are {dtype}"
        return None

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
        moments.feature_moments(features, weights, centred, shift, before, batch, mean, m2, cross)

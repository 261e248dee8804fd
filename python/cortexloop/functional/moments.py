"""Running first and second moments of features and responses, updated batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cortexloop import ops


@dataclass
class MomentState:
    """Sums over all images so far, of D features and T responses. Written in place by `feature_moments_update`.

    The responses' part is in host memory, the features' on any one device.

    Attributes:
        total: sum of the images' weights.
        response_mean, response_m2: float64 [T], weighted means and sums of squared deviations.
        mean, m2: float64 [D], the same of the features.
        cross: float32 [T, D], weighted sums of products of deviations.
    """

    total: float
    response_mean: Tensor
    response_m2: Tensor
    mean: Tensor
    m2: Tensor
    cross: Tensor

    @classmethod
    def empty(cls, neurons: int, features: int, device: torch.device | str = "cpu") -> MomentState:
        """The state before the first image."""
        double = torch.float64
        return cls(
            total=0.0,
            response_mean=torch.zeros(neurons, dtype=double),
            response_m2=torch.zeros(neurons, dtype=double),
            mean=torch.zeros(features, dtype=double, device=device),
            m2=torch.zeros(features, dtype=double, device=device),
            cross=torch.zeros(neurons, features, device=device),
        )


def feature_moments_update(
    features: Tensor, responses: Tensor, state: MomentState, weights: Tensor | None = None, *, backend: str = "auto"
) -> None:
    """Let a batch of images join a `MomentState`, in place.

    Equivalent, over all batches X [N, D], Y [N, T] with weights w [N], to

        mean = w @ X / w.sum();  m2 = w @ (X - mean) ** 2;  cross = (w[:, None] * (Y - w @ Y / w.sum())).T @ (X - mean)

    but safe for means far larger than the deviations: each batch is centred by itself, then merged (Chan, Golub &
    LeVeque 1983). Responses and means are float64; products of a batch are summed in float32.

    Args:
        features: [B, D], float32, float16 or bfloat16 (float64: reference only), contiguous, finite.
        responses: [B, T], finite; anywhere.
        state: of the same D and T, its features' part on the device of `features`.
        weights: [B], at least 0, not all 0; the weight of each image, such as its number of trials. None: ones.

    Raises:
        TypeError, ValueError: shapes, types or devices do not fit; weights are negative, not finite or all 0.
        BackendError: the backend named cannot run it.
    """
    if responses.ndim != 2 or responses.shape[0] != features.shape[0]:
        raise ValueError(
            f"responses should be [B, T] with the B = {features.shape[0]} images of the features, "
            f"got {list(responses.shape)}"
        )
    if responses.shape[1] != state.response_mean.shape[0]:
        raise ValueError(f"responses should be of {state.response_mean.shape[0]} neurons, got {list(responses.shape)}")
    y = responses.detach().to("cpu", torch.float64)
    if weights is None:
        w = torch.ones(y.shape[0], dtype=torch.float64)
    else:
        if tuple(weights.shape) != (y.shape[0],):
            raise ValueError(f"weights should be [{y.shape[0]}], one for each image, got {list(weights.shape)}")
        w = weights.detach().to("cpu", torch.float32).double()  # as the kernels see them
        if not bool(torch.isfinite(w).all()) or bool((w < 0).any()) or not bool((w > 0).any()):
            raise ValueError("weights should be finite, at least 0 and not all 0")
    batch = float(w.sum())
    centre = w @ y / batch
    deviation = y - centre
    shift = centre - state.response_mean
    factor = state.total * (batch / (state.total + batch))
    device = features.device
    ops.feature_moments(
        features,
        None if weights is None else w.float().to(device),
        (w[:, None] * deviation).float().to(device),
        shift.float().to(device),
        state.total,
        batch,
        state.mean,
        state.m2,
        state.cross,
        backend,
    )
    state.response_m2 += w @ deviation.square() + factor * shift.square()
    state.response_mean += shift * (batch / (state.total + batch))
    state.total += batch

"""The one place of tolerances: how much worse than float32 torch a kernel may be, measured against float64."""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR: dict[tuple[str, torch.dtype], float] = {
    # Seen on the cases of `cases.py` with 32 images: up to 2.1 where products are fused (Winograd's first layer), up to
    # 2.8 where they are rounded apart. (With two outputs the ratio is mostly chance.)
    ("bank_forward", torch.float32): 3.0,
    # Seen: up to 1.4.
    ("bank_input_gradient", torch.float32): 2.0,
    # Seen: up to 1.0, and 1.1 for the gradients.
    ("factorized_readout", torch.float32): 1.5,
    ("factorized_readout_gradient", torch.float32): 1.5,
    ("point_readout", torch.float32): 1.5,
    ("point_readout_gradient", torch.float32): 1.5,
}
"""Allowed error of a kernel, as a multiple of that of float32 torch on the same problem (flash-attention's rule)."""

_FLOOR = 2.0**-23  # relative to the largest value: torch may happen to be exact on a tiny problem


def error_ratio(actual: Tensor, torch32: Tensor, exact: Tensor) -> float:
    """RMS error of `actual` over that of `torch32` (or one rounding of the largest value), both from `exact`.

    Args:
        actual: what the kernel gave, float32.
        torch32: what float32 torch gave.
        exact: float64.

    Raises:
        AssertionError: shapes or dtypes differ, or a value is not finite.
    """
    assert actual.shape == torch32.shape == exact.shape, f"{actual.shape}, {torch32.shape} and {exact.shape} differ"
    assert exact.dtype == torch.float64, f"the yardstick should be float64, got {exact.dtype}"
    assert torch.isfinite(actual).all(), "the kernel gave NaN or infinity"
    if actual.numel() == 0:
        return 0.0

    def rms(x: Tensor) -> float:
        return float((x.double() - exact).square().mean().sqrt())

    return rms(actual) / max(rms(torch32), _FLOOR * float(exact.abs().max()), 1e-300)


def assert_matches_reference(actual: Tensor, torch32: Tensor, exact: Tensor, *, factor: float) -> None:
    """Assert that a kernel is at most `factor` times as far from float64 as float32 torch is.

    Raises:
        AssertionError: it is further away.
    """
    ratio = error_ratio(actual, torch32, exact)
    assert ratio <= factor, f"error is {ratio:.3g} times that of float32 torch, {factor:.3g} times is allowed"

"""Populations of codes in plain torch, on any device: what csrc/include/cortexloop/evolution.h defines, step by step.

Only operations that are rounded by themselves, in the written order, so that float32 results equal the kernels' bit for
bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 16  # Philox blocks side by side
GROUP = 4 * LANES  # columns they give
PARTIAL_SUMS = 64
_MASK = 0xFFFFFFFF
# ln(1 + f) = f - f^2/2 + f^3 P(f) on [sqrt(1/2) - 1, sqrt(2) - 1], highest power first
_LOG = (
    0.0714975372, -0.115712009, 0.116615109, -0.124110505, 0.142499372, -0.166684806, 0.200007081, -0.249999896,
    0.333333313,
)  # fmt: skip
_SINE = (-0.000195879504, 0.0083327489, -0.166666642)
_COSINE = (2.45476131e-05, -0.00138883002, 0.0416666642)


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * x, both below 2^32, in int64 without overflow."""
    low = (constant & 0xFFFF) * x
    high = (constant >> 16) * x + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _words(seed: int, stream: int, step: int, problems: Tensor, rows: int, columns: int) -> Tensor:
    """Philox 4x32-10: int64 [n, rows, groups, 4, 16], each below 2^32, in the order of the columns."""
    groups = -(-columns // GROUP)
    device = problems.device
    block = torch.arange(groups * LANES, device=device).view(1, 1, groups, LANES)
    row = (torch.arange(rows, device=device) | stream << 24).view(1, rows, 1, 1)
    shape = (problems.shape[0], rows, groups, LANES)
    counter = (block, row, torch.full_like(row, step), problems.view(-1, 1, 1, 1))
    c0, c1, c2, c3 = (part.expand(shape) for part in counter)
    key0, key1 = seed & _MASK, seed >> 32
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=3)


def _in_columns(grouped: Tensor, columns: int) -> Tensor:
    """[n, rows, groups, 4, 16] -> [n, rows, columns]."""
    return grouped.flatten(2)[..., :columns].contiguous()


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _minus_two_log(words: Tensor) -> Tensor:
    """-2 ln(((w >> 8) + 1) / 2^24), float32."""
    u = ((words >> 8) + 1).float() * 2.0**-24
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - exponent * 0x800000).view(torch.float32) - 1.0
    square = f * f
    log = (_polynomial(_LOG, f) * f * square - square * 0.5) + f
    return (log + exponent.float() * 0.693147182) * -2.0


def _normals(words: Tensor) -> Tensor:
    """Box-Muller: words 0 and 1 give numbers 0 and 1, words 2 and 3 give 2 and 3."""
    radius, angle = words[..., 0::2, :], words[..., 1::2, :] >> 8
    r = _minus_two_log(radius).double().sqrt().float()  # torch's float32 root may be one bit off; by way of float64 not
    x = ((angle & 0x3FFFFF) - 0x200000).float() * (1.57079637 / 4194304.0)
    y = x * x
    sine = (_polynomial(_SINE, y) * y * x + x) * r
    cosine = (_polynomial(_COSINE, y) * y * y - y * 0.5 + 1.0) * r
    quadrant = angle >> 22
    odd = (quadrant & 1).bool()
    along = torch.where(odd, sine, cosine)
    across = torch.where(odd, cosine, sine)
    along = torch.where((quadrant + 1 & 2).bool(), -along, along)
    across = torch.where((quadrant & 2).bool(), -across, across)
    return torch.stack((along, across), dim=-2).flatten(-3, -2)


def _ordered_sum(x: Tensor) -> Tensor:
    """Sum over the last axis in the order of evolution.h: 64 interleaved partial sums, then a binary tree."""
    missing = -x.shape[-1] % PARTIAL_SUMS
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    parts = x.reshape(*x.shape[:-1], -1, PARTIAL_SUMS).unbind(-2)
    total = torch.zeros_like(parts[0])
    for part in parts:
        total = total + part
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]


class CodeOperators:
    """Operators on populations of codes; any device, float32 or float64 (normal numbers are float32 values)."""

    def random_rows(
        self, normal: bool, seed: int, stream: int, step: int, problems: Tensor, rows: int, columns: int
    ) -> Tensor:
        words = _words(seed, stream, step, problems, rows, columns)
        return _in_columns(_normals(words) if normal else (words >> 8).float() * 2.0**-24, columns)

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
        z = self.random_rows(True, seed, stream, step, problems, rows, mean.shape[1]).to(mean.dtype)
        if factors is not None:
            left, right = (f[:, None] for f in factors)
            z = _low_rank(z, left, right)
        if diagonal is not None:
            z = diagonal[:, None] * z
        codes = mean[:, None] + scale[:, None, None] * z
        return codes if out is None else out.copy_(codes)

    def code_moments(self, codes: Tensor, weights: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor | None]:
        first = torch.zeros_like(codes[:, 0])
        second = None if centre is None else torch.zeros_like(first)
        for row in range(codes.shape[1]):
            code, weight = codes[:, row], weights[:, row, None]
            first = first + torch.where(weight == 0, 0, weight * code)
            if second is not None and centre is not None:
                deviation = code - centre
                second = second + torch.where(weight == 0, 0, weight * (deviation * deviation))
        return first, second

    def low_rank_product(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return _low_rank(x, left, right)

    def row_dots(self, x: Tensor, y: Tensor) -> Tensor:
        return _ordered_sum(x * y)


def _low_rank(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x (I + left^T right); x [..., columns], left and right [..., rank, columns] with x's leading axes or 1."""
    dots = [_ordered_sum(x * left[..., k, :]) for k in range(left.shape[-2])]
    for k, weight in enumerate(dots):
        x = x + weight[..., None] * right[..., k, :]
    return x

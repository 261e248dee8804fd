"""Sums and products of matrices whose bits depend on their terms alone, not on threads, batches or the library.

`cortexloop.ops` has the same for what is computed every generation; these serve the rest, on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEADING_BITS = 22


def running_sum(x: Tensor) -> Tensor:
    """Cumulative sums over the last axis, in log2(length) steps that each add one term: [..., m]."""
    step = 1
    while step < x.shape[-1]:
        x = torch.cat((x[..., :step], x[..., step:] + x[..., :-step]), dim=-1)
        step *= 2
    return x


class SplitMatrix:
    """A matrix M [K, columns] as M1 + M2, so that x M is a few products in float64 that are exact in any order.

    Matrix products sum in an order of the library's choice. Where all factors are whole multiples of a power of two and
    short enough, though, no partial sum is rounded (Ozaki et al. 2012, "Error-free transformations of matrix
    multiplication"). Entries are kept to about 42 bits relative to the largest one, fewer for K above 1024.
    """

    def __init__(self, matrix: Tensor) -> None:
        # A sum of K products is exact as long as it has at most 53 bits.
        bits = 53 - LEADING_BITS - math.ceil(math.log2(matrix.shape[0]))
        exact = matrix.double()
        self.exponent = math.frexp(float(exact.abs().max()))[1]
        exact = exact * math.ldexp(1, -self.exponent)
        self.high = _rounded(exact, bits)
        self.low = _rounded(exact - self.high, 2 * bits)

    def multiply(self, x: Tensor) -> Tensor:
        """x M in float64, [..., columns]; x [..., K], each row to 44 bits relative to its largest entry."""
        exponent = torch.frexp(x.double().abs().amax(dim=-1, keepdim=True)).exponent
        exact = x.double() * _power_of_two(-exponent)
        high = _rounded(exact, LEADING_BITS)
        low = _rounded(exact - high, 2 * LEADING_BITS)
        product = high @ self.high + (high @ self.low + low @ self.high)
        return product * _power_of_two(exponent + self.exponent)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64, exact (torch.ldexp goes by way of a float32 exponential)."""
    return (exponent.long() + 1023 << 52).view(torch.float64)


def _rounded(x: Tensor, bits: int) -> Tensor:
    """To multiples of 2^-bits."""
    return (x * math.ldexp(1, bits)).round() * math.ldexp(1, -bits)

"""How well predictions explain recorded responses: correlation, noise-corrected R2, SNR and reliability.

All functions are vectorised over neurons, take NaN as "not shown" and return nan where a value is undefined.
May import: NumPy only.
"""

from __future__ import annotations

from cortexloop.metrics.correlation import coefficient_of_determination, mean_over_repeats, pearson_r, r_squared
from cortexloop.metrics.reliability import (
    brainscore_r2,
    noise_corrected_r2,
    noise_variance,
    repeat_counts,
    snr,
    split_half,
)

__all__ = [
    "brainscore_r2",
    "coefficient_of_determination",
    "mean_over_repeats",
    "noise_corrected_r2",
    "noise_variance",
    "pearson_r",
    "r_squared",
    "repeat_counts",
    "snr",
    "split_half",
]

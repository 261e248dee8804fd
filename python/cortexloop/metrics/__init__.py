"""How well predictions explain recorded responses: correlation, noise-corrected R2, SNR, reliability and ceilings.

All functions are vectorised over neurons, take NaN as "not shown" and return nan where a value is undefined.
May import: NumPy only.
"""

from __future__ import annotations

from cortexloop.metrics.agreement import (
    ceiling_normalised_r,
    fraction_of_explained_variance,
    noise_ceiling,
    spearman_r,
)
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
    "ceiling_normalised_r",
    "coefficient_of_determination",
    "fraction_of_explained_variance",
    "mean_over_repeats",
    "noise_ceiling",
    "noise_corrected_r2",
    "noise_variance",
    "pearson_r",
    "r_squared",
    "repeat_counts",
    "snr",
    "spearman_r",
    "split_half",
]

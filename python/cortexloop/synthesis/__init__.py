"""Images made for model neurons: gradient ascent, adversarial images, and stimuli for tuning curves.

May import: `functional`, `bank`, `images` and `weights`; torch and NumPy.
"""

from __future__ import annotations

from cortexloop.images import gaussian_blur
from cortexloop.synthesis.ascent import Adversarial, Ascent, adversarial, maximize, noise_image
from cortexloop.synthesis.tuning import (
    dot_images,
    dot_location_tuning,
    dot_number_tuning,
    dot_size_tuning,
    grating_images,
    orientation_tuning,
    preferred_locations,
)

__all__ = [
    "Adversarial",
    "Ascent",
    "adversarial",
    "dot_images",
    "dot_location_tuning",
    "dot_number_tuning",
    "dot_size_tuning",
    "gaussian_blur",
    "grating_images",
    "maximize",
    "noise_image",
    "orientation_tuning",
    "preferred_locations",
]

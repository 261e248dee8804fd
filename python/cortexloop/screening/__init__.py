"""Searching image banks of any size for the images that drive each neuron most, or least.

May import: `functional`, `bank`.
"""

from __future__ import annotations

from cortexloop.screening.top import TopImages, TopK, top_images

__all__ = ["TopImages", "TopK", "top_images"]

"""`cortexloop saliency`: which pixels drive a model neuron. See `command`."""

from __future__ import annotations

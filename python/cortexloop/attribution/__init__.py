"""What in an image a neuron responds to: gradients, integrated gradients, occlusion, and parallel backpropagation.

    maps = attribution.Saliency(bank).attribute(images)                 # [B, N, H, W, 3]: every neuron, every image
    maps = attribution.IntegratedGradients(bank).attribute(images, pairs=best_neuron)                 # [B, H, W, 3]
    readout = attribution.Readout(source, weights)                      # linear weights on any network's features
    maps = attribution.Saliency(readout).attribute(images)

All neurons of an image are done in one call, in chunks that keep within a budget of memory. May import: `functional`,
`features` and leaves; torch and NumPy.
"""

from __future__ import annotations

from cortexloop.attribution.base import Method, PixelMethod
from cortexloop.attribution.gradients import InputXGradient, Saliency, SmoothGrad
from cortexloop.attribution.integrated import IntegratedGradients, path_nodes
from cortexloop.attribution.occlusion import Occlusion, Patches, Smoothed, greedy_smoothing, patches
from cortexloop.attribution.parallel import PairMaps, ParallelBackprop, References
from cortexloop.attribution.post import Post
from cortexloop.attribution.targets import BankTarget, Readout, Target
from cortexloop.attribution.weights import FactorsLike, ReadoutWeights

__all__ = [
    "BankTarget",
    "FactorsLike",
    "InputXGradient",
    "IntegratedGradients",
    "Method",
    "Occlusion",
    "PairMaps",
    "ParallelBackprop",
    "Patches",
    "PixelMethod",
    "Post",
    "Readout",
    "ReadoutWeights",
    "References",
    "Saliency",
    "SmoothGrad",
    "Smoothed",
    "Target",
    "greedy_smoothing",
    "patches",
    "path_nodes",
]

"""Readouts: modules from feature maps [B, C, H, W] to the responses of T neurons [B, T], with regularisers.

Linear but for the sampling of `GaussianReadout`; an output nonlinearity comes behind, as in
`nn.Sequential(readout, EluPlusOne())`. Forward passes change no parameter: what a constraint means for the values is
computed on the way, and `project()` brings the parameters themselves into range after an optimiser's step.

May import: `functional`, `weights`, torch.
"""

from __future__ import annotations

from cortexloop.readouts.base import EluPlusOne, Readout
from cortexloop.readouts.dense import DenseReadout
from cortexloop.readouts.factorized import FactorizedReadout
from cortexloop.readouts.gaussian import GaussianReadout
from cortexloop.readouts.point_pooled import PointPooledReadout

__all__ = [
    "DenseReadout",
    "EluPlusOne",
    "FactorizedReadout",
    "GaussianReadout",
    "PointPooledReadout",
    "Readout",
]

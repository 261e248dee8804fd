"""Readable torch modules of the networks: the independent reference of every kernel, and what training trains.

They keep batch normalisation unfolded, know nothing of packed banks, and run in any floating dtype on any device.
May import: torch, numpy and `cortexloop.weights`; nothing else of cortexloop.
"""

from __future__ import annotations

from cortexloop.models.compact import CompactModel
from cortexloop.models.shared import SharedCompactModel

__all__ = ["CompactModel", "SharedCompactModel"]

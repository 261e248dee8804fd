"""Sources of stimuli for a session: see `cortexloop.realtime.source.Source` for what they have in common."""

from __future__ import annotations

from cortexloop.realtime.sources.evolution import EvolutionSource
from cortexloop.realtime.sources.fixed import FixedImages

__all__ = ["EvolutionSource", "FixedImages"]

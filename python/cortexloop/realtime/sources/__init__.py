"""Sources of stimuli for a session: see `cortexloop.realtime.source.Source` for what they have in common."""

from __future__ import annotations

from cortexloop.realtime.sources.candidates import CandidateSource
from cortexloop.realtime.sources.controls import ControlSource
from cortexloop.realtime.sources.evolution import EvolutionSource
from cortexloop.realtime.sources.fixed import FixedImages
from cortexloop.realtime.sources.guided import ModelGuided
from cortexloop.realtime.sources.synthesis import SynthesisSource

__all__ = ["CandidateSource", "ControlSource", "EvolutionSource", "FixedImages", "ModelGuided", "SynthesisSource"]

"""A rig without an animal: simulated display, acquisition, neurons and mishaps, which drive a real session.

The truth is known: which spikes were fired, when light came on, what was lost. So a simulated day can say whether
responses were lost or counted wrongly, and how far off each onset was.
"""

from __future__ import annotations

from cortexloop.rig.simulated.days import DAYS, Day
from cortexloop.rig.simulated.neurons import Neurons, textbook_neurons
from cortexloop.rig.simulated.report import DayReport
from cortexloop.rig.simulated.rig import SimulatedRig
from cortexloop.rig.simulated.session import example, simulate

__all__ = ["DAYS", "Day", "DayReport", "Neurons", "SimulatedRig", "example", "simulate", "textbook_neurons"]

"""Time pressure: plans that are bound before the first call, and sessions that a rig can trust.

`Plan` evaluates a bank with all memory allocated beforehand. `Session` is the loop with a rig: a state machine between
sources of stimuli (`sources/`), messages (`messages`) and a journal (`journal`, `records`), with an injected clock.

May import: `evolve`, `synthesis`, `screening`, `factor`, `features`, `regression`, `io`, `functional`, and `_native`
for the bound plan of the C++ kernels.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cortexloop.realtime.plan import Plan

if TYPE_CHECKING:
    from cortexloop.realtime.journal import Journal, JournalError
    from cortexloop.realtime.session import ResumeError, Session
    from cortexloop.realtime.settings import SessionSettings, StreamSettings
    from cortexloop.realtime.source import Proposal, Source

# `Plan` alone is imported at once: the rest stands on more rooms than a benchmark of a plan should load.
_LAZY = {
    "Journal": "journal",
    "JournalError": "journal",
    "Proposal": "source",
    "ResumeError": "session",
    "Session": "session",
    "SessionSettings": "settings",
    "Source": "source",
    "StreamSettings": "settings",
}

__all__ = [
    "Journal",
    "JournalError",
    "Plan",
    "Proposal",
    "ResumeError",
    "Session",
    "SessionSettings",
    "Source",
    "StreamSettings",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"cortexloop.realtime.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

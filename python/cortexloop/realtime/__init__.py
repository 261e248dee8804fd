"""Repeated evaluation under time pressure: everything is allocated and bound before the first call.

May import: `functional`, `bank`, `ops`, `_device`, and `_native` for the bound plan of the C++ kernels.
"""

from __future__ import annotations

from cortexloop.realtime.plan import Plan

__all__ = ["Plan"]

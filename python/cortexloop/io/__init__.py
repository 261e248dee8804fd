"""Readers and writers: model files, images, recorded responses, result tables.

May import `cortexloop.weights`, NumPy and file-format libraries, nothing else of cortexloop.
"""

from __future__ import annotations

from cortexloop.io.atomic import atomic_path

__all__ = ["atomic_path"]

"""`cortexloop fit`: factorized encoding models of recorded neurons. See `command`."""

from __future__ import annotations

"""Launching a Triton kernel, with its name in the error."""

from __future__ import annotations

from typing import Any


def launch(kernel: Any, programs: int, *arguments: object, **compiled: object) -> None:
    """Run a kernel as `programs` programs.

    Raises:
        RuntimeError: it could not be compiled or launched; the message names it.
    """
    try:
        kernel[(programs,)](*arguments, **compiled)
    except Exception as error:
        raise RuntimeError(f"the Triton kernel {kernel.__name__} could not run: {error}") from error

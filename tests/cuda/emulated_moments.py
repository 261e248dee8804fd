"""Streaming moments on the emulated device: every buffer guarded, inputs read-only."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from guarded import Guarded, guarded
from torch import Tensor

from cortexloop._native.moments import FEATURE_CODES
from moment_problems import MomentProblem, State


def writable(x: Tensor, align: int, at_start: bool) -> Guarded:
    """A copy of a tensor that a kernel may update."""
    buffer = Guarded(x.numel() * x.element_size(), align, at_start)
    buffer.bytes()[:] = x.contiguous().view(-1).view(torch.uint8).numpy()
    return buffer


def emulated_moments(
    module: ModuleType, problem: MomentProblem, *, at_start: bool = False, align: int | None = None
) -> State:
    """The state after the problem's batch.

    Args:
        module: the emulated module `_cuda`.
        at_start: whether buffers touch the page in front of them rather than the one behind.
        align: of all addresses; that of each number's type if None, so that rows start anywhere.
    """
    p, state = problem, problem.state
    inputs: dict[str, Guarded] = {
        name: guarded(x, align, at_start)
        for name, x in (("features", p.features), ("weights", p.weights), ("centred", p.centred), ("shift", p.shift))
        if x is not None
    }
    outputs = [writable(x, align or x.element_size(), at_start) for x in (state.mean, state.m2, state.cross)]
    addresses: dict[str, Any] = {name: buffer.address for name, buffer in inputs.items()}
    module.feature_moments(
        addresses["features"],
        FEATURE_CODES[p.features.dtype],
        addresses.get("weights", 0),
        addresses["centred"],
        addresses["shift"],
        p.before,
        p.batch,
        *p.features.shape,
        p.centred.shape[1],
        *(buffer.address for buffer in outputs),
        0,
        0,
    )
    for buffer in (*inputs.values(), *outputs):
        buffer.check()
    shapes = [(x.dtype, tuple(x.shape)) for x in (state.mean, state.m2, state.cross)]
    return State(*(buffer.tensor(*shape).clone() for buffer, shape in zip(outputs, shapes, strict=True)))

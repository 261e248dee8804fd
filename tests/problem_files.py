"""Problems with exact answers as files, for test programs in C++; tests/cpp/problem.h reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import cortexloop as cl
from cortexloop.testing import Case, exact_inputs


def write_problem(path: Path, case: Case, paired: bool) -> None:
    """Write `exact_inputs(case)` with its answers; with `paired`, each image for one model only."""
    inputs = exact_inputs(case)
    pairs = inputs.pairs if paired else None
    cotangent = inputs.cotangent[torch.arange(len(inputs.pairs)), inputs.pairs] if paired else inputs.cotangent
    bank = inputs.bank
    images = inputs.images.double()
    responses = cl.responses(images, bank, pairs=pairs, backend="reference")
    grad = cl.input_gradient(images, bank, cotangent.double(), pairs=pairs, backend="reference")
    batch, height, width, _ = inputs.images.shape
    header = [batch, height, width, len(bank), bank.table.shape[1], bank.weights.numel(), int(paired)]
    parts = [
        np.array(header, dtype=np.int64),
        bank.weights.numpy(),
        bank.table.numpy(),
        inputs.images_uint8.numpy(),
        inputs.images.numpy(),
        inputs.pairs.numpy(),
        cotangent.float().numpy(),
        responses.float().numpy(),
        grad.float().numpy(),
    ]
    path.write_bytes(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))

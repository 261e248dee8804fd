"""A short program for compute-sanitizer: every kernel of the CUDA backend on small problems, with checked results.

    compute-sanitizer --tool memcheck python tests/gpu/sanitizer_check.py

With `--rehearse` on the CPU, by the reference backend.
"""

from __future__ import annotations

import sys

import torch

import cortexloop as cl
from cortexloop import ops
from cortexloop.testing import CASES, PAIRED_CASES, exact_inputs

REHEARSAL = "--rehearse" in sys.argv
DEVICE = torch.device("cpu" if REHEARSAL else "cuda:0")
BACKEND = "reference" if REHEARSAL else "cuda"
NAMES = ("1x1-deep", "5x7-kernel-7", "8x8-kernel-1-stride-2", "17x13-mixed", "28x28-published", "17x13-pairs")


def moments() -> list[str]:
    """What is wrong with streaming moments: rows that are aligned and rows that are not, every dtype."""
    wrong = []
    for images, columns, neurons in ((70, 17, 65), (40, 264, 4)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.arange(images * columns).reshape(images, columns) % 7 - 3.0
            x -= x.sum(dim=0) // images
            x[-1] -= x.sum(dim=0)  # the mean of each column is 0
            centred = torch.arange(images * neurons).reshape(images, neurons) % 5 - 2.0
            got = []
            for device, name in ((torch.device("cpu"), "reference"), (DEVICE, BACKEND)):
                state = [torch.zeros(columns).double(), torch.zeros(columns).double(), torch.zeros(neurons, columns)]
                mean, m2, cross = (part.to(device) for part in state)
                inputs = [part.to(device) for part in (x.to(dtype), torch.ones(images), centred, torch.ones(neurons))]
                ops.feature_moments(*inputs, float(images), float(images), mean, m2, cross, backend=name)
                got.append([part.cpu() for part in (mean, m2, cross)])
            if not all(torch.equal(a, b) for a, b in zip(*got, strict=True)):
                wrong.append(f"moments of {images} x {columns} {dtype} features with {neurons} neurons")
    print("moments: done", flush=True)
    return wrong


def main() -> int:
    """Exit code 1 if a result is wrong; the sanitizer's own findings are its exit code."""
    wrong = []
    for case in (c for c in (*CASES, *PAIRED_CASES) if c.name in NAMES):
        inputs = exact_inputs(case)
        expected = cl.input_gradient(
            inputs.images.double(), inputs.bank, inputs.cotangent.double(), backend="reference", return_responses=True
        )
        bank, cotangent = inputs.bank.to(DEVICE), inputs.cotangent.to(DEVICE)
        for images in (inputs.images.to(DEVICE), inputs.images_uint8.to(DEVICE)):
            grad, responses = cl.input_gradient(images, bank, cotangent, backend=BACKEND, return_responses=True)
            got = cl.responses(images, bank, backend=BACKEND)
            pairs = inputs.pairs.to(DEVICE)
            paired = cl.responses(images, bank, pairs=pairs, backend=BACKEND)
            cl.input_gradient(images, bank, torch.ones_like(paired), pairs=pairs, backend=BACKEND)
            fast = cl.responses(images, bank, backend=BACKEND, precision="fast")
            same = [
                torch.equal(grad.cpu(), expected[0].float()),
                torch.equal(responses.cpu(), expected[1].float()),
                torch.equal(got.cpu(), expected[1].float()),
                torch.equal(paired.cpu(), expected[1].float()[torch.arange(len(pairs)), inputs.pairs]),
                bool(torch.isfinite(fast).all()),
            ]
            if not all(same):
                wrong.append(f"{case.name}, {images.dtype}: {same}")
        print(f"{case.name}: done", flush=True)
    wrong += moments()
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

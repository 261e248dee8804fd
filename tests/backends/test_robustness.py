"""Many callers, forked processes, many calls."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import cortexloop as cl
from cortexloop.testing import CASES, Case, ModelShape, random_inputs


def test_concurrent_callers(engine: str) -> None:
    """Four Python threads at once get what one gets alone."""
    case = CASES[11]
    inputs = random_inputs(Case(case.name, 8, case.height, case.width, case.models, case.seed))
    bank = inputs.bank

    def work(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, cotangent = inputs.images[i : i + 1], inputs.cotangent[i : i + 1]
        return cl.responses(image, bank, backend=engine), cl.input_gradient(image, bank, cotangent, backend=engine)

    serial = [work(i) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(work, [i % 8 for i in range(64)]))
    for i, (responses, grad) in enumerate(parallel):
        assert torch.equal(responses, serial[i % 8][0])
        assert torch.equal(grad, serial[i % 8][1])


def test_threads_may_change_while_others_compute(kernels: None, restore_threads: None) -> None:
    inputs = random_inputs(CASES[12])
    expected = cl.responses(inputs.images, inputs.bank, backend="cpu")

    def work(i: int) -> bool:
        if i % 4 == 0:
            cl.set_num_threads(1 + i // 4 % 3)
        return torch.equal(cl.responses(inputs.images, inputs.bank, backend="cpu"), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(40)))


_FORK = """
import os, sys, numpy as np, cortexloop as cl
from cortexloop.testing import CASES, random_inputs
inputs = random_inputs(CASES[12])
images = inputs.images.numpy()
cl.set_num_threads(2)
before = cl.responses(images, inputs.bank, backend="cpu")   # the pool runs in the parent
child = os.fork()
if child == 0:
    same = np.array_equal(cl.responses(images, inputs.bank, backend="cpu"), before)
    os._exit(0 if same else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
after = np.array_equal(cl.responses(images, inputs.bank, backend="cpu"), before)
sys.exit(status or (0 if after else 4))
"""


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_a_forked_child_computes(kernels: None) -> None:
    """Threads do not survive a fork; the child must neither hang nor compute something else."""
    done = subprocess.run([sys.executable, "-c", _FORK], timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _resident() -> int:
    """Largest resident size so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("kind", ["plan", "responses", "input_gradient"])
def test_no_leak_over_many_calls(kernels: None, kind: str) -> None:
    inputs = random_inputs(Case("leak", 1, 4, 4, (ModelShape((2, 3), (3, 3), (1, 2)),)))
    images, bank, cotangent = inputs.images_uint8, inputs.bank, inputs.cotangent
    plan = cl.Plan(bank)
    calls = {"plan": 100_000, "responses": 30_000, "input_gradient": 20_000}[kind]

    def run(n: int) -> None:
        if kind == "plan":
            for _ in range(n):
                plan.run()
        elif kind == "responses":
            for _ in range(n):
                cl.responses(images, bank)
        else:
            for _ in range(n):
                cl.input_gradient(images, bank, cotangent)

    run(2000)
    gc.collect()
    before = _resident()
    run(calls)
    gc.collect()
    # A leak of one tensor (over 100 bytes) per call would be megabytes.
    assert _resident() - before < 1500
    tracemalloc.start()
    run(10)
    start = tracemalloc.get_traced_memory()[0]
    run(500)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - start
    tracemalloc.stop()
    assert grown < 2000

"""Non-negative factorization: every instruction set against plain torch, its promises, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import cortexloop as cl
from cortexloop import functional


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Plain torch on problems so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def problem(
    rng: np.random.Generator, count: int, n: int, c: int, rank: int, *, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy matrices of this rank and a random start, float32."""
    m = rng.random((count, n, rank)) @ rng.standard_normal((count, rank, c)) + 0.1 * rng.standard_normal((count, n, c))
    start = rng.random((count, rank, n)), rng.random((count, rank, 2 * c if signed else c))
    m, w, h = (torch.from_numpy(a.astype(np.float32)) for a in (m if signed else np.abs(m), *start))
    return m, w, h


def parts(m: Tensor, signed: bool) -> Tensor:
    return torch.cat([m.clamp(min=0), (-m).clamp(min=0)], dim=2) if signed else m


SIZES = [(3, 20, 30, 3), (1, 1, 1, 1), (2, 7, 16, 2), (2, 8, 17, 4), (2, 9, 77, 5), (1, 33, 130, 9)]


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel_equals_plain_torch(isa: str, rng: np.random.Generator, size: tuple[int, int, int, int], signed: bool):
    """After one iteration closely, and after many by the objective (rounding is amplified on the way)."""
    count, n, c, rank = size
    m, w, h = problem(rng, count, n, c, rank, signed=signed)
    for penalties in ({}, {"l1": (0.3, 0.2), "l2": (0.1, 0.4)}):
        options = {"signed": signed, "tolerance": 0.0, **penalties}
        exact = functional.nmf(m.double(), w.double(), h.double(), max_iterations=1, backend="reference", **options)
        found = functional.nmf(m, w, h, max_iterations=1, backend="cpu", **options)
        for ours, theirs in zip(found[:2], exact[:2], strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    exact = functional.nmf(m.double(), w.double(), h.double(), backend="reference", signed=signed)
    found = functional.nmf(m, w, h, backend="cpu", signed=signed)
    x = parts(m.double(), signed)
    errors = [(x - a.double().mT @ b.double()).square().sum((1, 2)) for a, b, _ in (found, exact)]
    torch.testing.assert_close(errors[0], errors[1], rtol=2e-3, atol=1e-5 * float(x.square().sum()))
    assert (found[2] >= 1).all()


def test_descent_never_rises(isa: str, rng: np.random.Generator):
    m, w, h = problem(rng, 4, 15, 40, 3, signed=True)
    x = parts(m.double(), True)
    before = torch.full((4,), torch.inf, dtype=torch.float64)
    for _ in range(10):
        w, h, _ = functional.nmf(m, w, h, signed=True, max_iterations=1, backend="cpu")
        after = (x - w.double().mT @ h.double()).square().sum((1, 2))
        assert (after <= before * (1 + 1e-6)).all()
        assert (w >= 0).all()
        assert (h >= 0).all()
        before = after


def test_iterations_and_results_do_not_depend_on_others_or_threads(
    isa: str, rng: np.random.Generator, restore_threads: None
):
    m, w, h = problem(rng, 6, 12, 50, 3, signed=True)
    cl.set_num_threads(1)
    one = functional.nmf(m, w, h, signed=True, backend="cpu")
    cl.set_num_threads(2)
    two = functional.nmf(m, w, h, signed=True, backend="cpu")
    alone = functional.nmf(m[2:3], w[2:3], h[2:3], signed=True, backend="cpu")
    for a, b, c in zip(one, two, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[2:3], c)
    limited = functional.nmf(m, w, h, signed=True, max_iterations=3, tolerance=0.0, backend="cpu")
    assert limited[2].tolist() == [3] * 6


def test_zeros_stay_finite(engine: str):
    m, w, h = torch.zeros(1, 4, 5), torch.ones(1, 2, 4), torch.ones(1, 2, 5)
    found = functional.nmf(m, w, h, backend=engine)
    for values in found[:2]:
        assert torch.isfinite(values).all()
    assert not (found[0].mT @ found[1]).any()
    assert functional.nmf(m[:0], w[:0], h[:0], backend=engine)[2].shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w": torch.ones(1, 2, 5)}, ValueError, r"w should be \[1, 'R', 4\]"),
        ({"signed": True}, ValueError, r"h \[1, 'R', 10\]"),
        ({"matrices": -torch.ones(1, 4, 5)}, ValueError, "negative entries"),
        ({"w": -torch.ones(1, 2, 4)}, ValueError, "should not be negative"),
        ({"h": torch.ones(1, 2, 5).double()}, TypeError, "all be float32 or all float64"),
        ({"matrices": torch.ones(4, 5)}, ValueError, "3 axes"),
        ({"tolerance": -1.0}, ValueError, "should not be negative"),
        ({"max_iterations": 0}, ValueError, "at least 1"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], error: type[Exception], message: str):
    arguments = {"matrices": torch.ones(1, 4, 5), "w": torch.ones(1, 2, 4), "h": torch.ones(1, 2, 5), **change}
    with pytest.raises(error, match=message):
        functional.nmf(**arguments)

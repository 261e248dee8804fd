"""The operator of running moments: exact answers on every backend and instruction set, and what it refuses."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

import cortexloop as cl
from cortexloop import ops
from moment_problems import MomentProblem, State, answer, exact_moments, random_moments

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 1, 1), (2, 15, 3), (63, 17, 7), (64, 1000, 64), (128, 481, 65), (127, 97, 9), (5, 960, 8)]

FACTOR = {"mean": 2, "m2": 5, "cross": 2}
"""Up to 128 squares are summed one after the other in float32."""


def solve(problem: MomentProblem, backend: str = "auto") -> State:
    state = problem.state.clone()
    ops.feature_moments(*problem.inputs, state.mean, state.m2, state.cross, backend)
    return state


@functools.cache
def exact(
    images: int, columns: int, neurons: int, dtype: torch.dtype, weighted: bool = False, times_before: int = 3
) -> tuple[MomentProblem, State]:
    """A problem and its answer, made once for all backends."""
    problem = exact_moments(images, columns, neurons, dtype=dtype, weighted=weighted, times_before=times_before)
    return problem, rounded(answer(problem))


def rounded(state: State) -> State:
    return State(state.mean, state.m2, state.cross.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("images", "columns", "neurons"), SIZES)
def test_exact(engine: str, images: int, columns: int, neurons: int, dtype: torch.dtype):
    for weighted in (False, True):
        for times_before in (0, 1, 3):
            problem, expected = exact(images, columns, neurons, dtype, weighted, times_before)
            assert solve(problem, engine).equals(expected), (weighted, times_before)


@pytest.mark.parametrize("images", [256, 640])
def test_exact_in_blocks_of_images(engine: str, images: int):
    """The kernel centres more than 128 images at the mean of the first 128: here the mean of each 128, an integer."""
    part, _ = exact(128, 100, 9, torch.float32)
    order = torch.Generator().manual_seed(1)
    blocks = [part.features[torch.randperm(128, generator=order)] for _ in range(images // 128)]
    problem = replace(exact(images, 100, 9, torch.float32)[0], features=torch.cat(blocks))
    assert solve(problem, engine).equals(rounded(answer(problem)))


def test_float64_runs_on_the_reference():
    problem, expected = exact(12, 30, 5, torch.float64)
    assert solve(problem, "reference").equals(expected)
    assert cl.explain("feature_moments", dtype="float64").chosen == "reference"
    assert "float64" in str(cl.explain("feature_moments", dtype="float64").reason("cpu"))


@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "weights"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_close_to_float64(engine: str, dtype: torch.dtype, weighted: bool):
    """Error at most a few times that of the same formula in float32 torch, which sums in pairs."""
    for images in (64, 300):
        problem = random_moments(images, 700, 13, dtype=dtype, weighted=weighted, seed=images)
        expected, single = answer(problem), answer(problem, torch.float32)
        got = solve(problem, engine)
        for name in ("mean", "m2", "cross"):
            right = getattr(expected, name)
            error = (getattr(got, name).double() - right).abs()
            allowed = (getattr(single, name).double() - right).abs().max()
            assert float(error.max()) <= FACTOR[name] * float(allowed), name


def test_infinite_features_stay_in_their_columns(engine: str):
    problem = random_moments(40, 100, 9)
    clean = solve(problem, engine)
    problem.features[3, 7], problem.features[5, 50] = torch.inf, torch.nan
    got = solve(problem, engine)
    others = torch.ones(100, dtype=torch.bool)
    others[[7, 50]] = False
    for name in ("mean", "m2", "cross"):
        assert torch.equal(getattr(got, name)[..., others], getattr(clean, name)[..., others])
        assert not torch.isfinite(getattr(got, name)[..., 50]).any()


def test_float16_values_are_taken_exactly(engine: str):
    """All finite float16 and many bfloat16 numbers as the one image of a first batch: the mean is the number."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = patterns.view(dtype)
        x = x[torch.isfinite(x)][None].clone()
        state = State(torch.zeros(x.shape[1]).double(), torch.zeros(x.shape[1]).double(), torch.zeros(1, x.shape[1]))
        one = torch.zeros(1, 1)
        ops.feature_moments(x, None, one, one[0], 0.0, 1.0, state.mean, state.m2, state.cross, engine)
        assert torch.equal(state.mean, x[0].double())
        assert not state.m2.any()


REFUSED = {
    "features of one axis": ({"features": torch.zeros(8)}, ValueError, r"features should be \[B, D\]"),
    "no images": ({"features": torch.zeros(0, 6)}, ValueError, r"B and D at least 1, got \[0, 6\]"),
    "integers": ({"features": torch.zeros(4, 6, dtype=torch.int32)}, TypeError, "features should be torch.float32"),
    "strides": ({"features": torch.zeros(6, 4).T}, ValueError, "features should be contiguous"),
    "weights": ({"weights": torch.ones(5)}, ValueError, r"weights should have shape \[4\], got \[5\]"),
    "float64 weights": ({"weights": torch.ones(4).double()}, TypeError, "weights should be torch.float32"),
    "centred": ({"centred": torch.zeros(5, 3)}, ValueError, r"centred should have shape \[4, 3\], got \[5, 3\]"),
    "no neurons": ({"centred": torch.zeros(4, 0)}, ValueError, "T at least 1"),
    "shift": ({"shift": torch.zeros(2)}, ValueError, r"shift should have shape \[3\]"),
    "mean": ({"mean": torch.zeros(6)}, TypeError, "mean should be torch.float64"),
    "m2": ({"m2": torch.zeros(7).double()}, ValueError, r"m2 should have shape \[6\]"),
    "cross": ({"cross": torch.zeros(6, 3).T}, ValueError, "cross should be contiguous"),
    "before": ({"before": -1.0}, ValueError, "before should be a weight of at least 0"),
    "batch": ({"batch": 0.0}, ValueError, "batch should be a weight above 0"),
    "not finite": ({"batch": float("nan")}, ValueError, "batch should be a weight above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_does_not_fit(engine: str, case: str):
    changed, error, message = REFUSED[case]
    arguments = {
        "features": torch.zeros(4, 6),
        "weights": None,
        "centred": torch.zeros(4, 3),
        "shift": torch.zeros(3),
        "before": 2.0,
        "batch": 4.0,
        "mean": torch.zeros(6).double(),
        "m2": torch.zeros(6).double(),
        "cross": torch.zeros(3, 6),
    }
    with pytest.raises(error, match=message):
        ops.feature_moments(**{**arguments, **changed}, backend=engine)  # type: ignore[arg-type]


def test_no_graph_is_kept(engine: str):
    problem = exact_moments(8, 20, 3)
    problem = replace(problem, features=problem.features.requires_grad_())
    assert not solve(problem, engine).cross.requires_grad

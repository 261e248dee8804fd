"""Streaming moments in Triton's interpreter: run by test_triton_kernels.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import triton

from cortexloop import ops
from cortexloop.backends.registry import Problem, backend
from cortexloop.backends.triton import moments
from cortexloop.testing import error_ratio
from moment_problems import MomentProblem, State, answer, exact_moments, random_moments

DTYPES = moments.FEATURE_DTYPES

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")


def updated(problem: MomentProblem, name: str = "triton") -> State:
    state = problem.state.clone()
    ops.feature_moments(*problem.inputs, state.mean, state.m2, state.cross, backend=name)
    return state


def usable() -> None:
    """Older interpreters turn arrays of one number into a Python number, which newer NumPy refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            updated(exact_moments(1, 1, 1))
        except RuntimeError as error:
            if "only 0-dimensional arrays" in str(error):
                reason = f"Triton {triton.__version__}'s interpreter does not work with NumPy {np.__version__}"
                pytest.skip(reason, allow_module_level=True)
            raise


usable()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 17, 3), (64, 130, 65), (33, 64, 64)], ids=str)
def test_exact(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for weighted, times_before in ((False, 3), (True, 0)):
        problem = exact_moments(*shape, dtype=dtype, weighted=weighted, times_before=times_before)
        expected = answer(problem)
        assert updated(problem).equals(State(expected.mean, expected.m2, expected.cross.float()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_close(dtype: torch.dtype) -> None:
    problem = random_moments(150, 70, 20, dtype=dtype, weighted=True)
    got, expected = updated(problem), answer(problem)
    assert error_ratio(got.cross, answer(problem, torch.float32).cross, expected.cross) < 0.5
    spread = (expected.m2 / (problem.before + problem.batch)).sqrt()
    assert ((got.mean - expected.mean).abs() / spread).max() < 1e-7
    assert ((got.m2 - expected.m2).abs() / expected.m2).max() < 1e-6


def test_a_constant_column_has_no_spread() -> None:
    problem = random_moments(45, 8, 2)
    problem.features[:, 3] = 0.1
    for state in vars(problem.state).values():
        state.zero_()
    got = updated(MomentProblem(*problem.inputs[:4], 0.0, problem.batch, problem.state))
    assert got.m2[3] == 0
    assert got.mean[3] == problem.features[0, 3]
    assert (got.cross[:, 3] == 0).all()


def test_numbers_of_the_host_reach_the_kernel_in_48_bits() -> None:
    for x in (1 / 3, 1e9 + 1, 2.0**47 + 1, 7.0):
        high, low = moments.halves(x)
        assert abs(high + low - x) <= 2.0**-48 * x
    problem = exact_moments(4, 5, 2)
    big = 3.0 * 2**40
    got = updated(MomentProblem(*problem.inputs[:4], big - problem.batch, problem.batch, problem.state))
    expected = answer(MomentProblem(*problem.inputs[:4], big - problem.batch, problem.batch, problem.state))
    assert torch.allclose(got.mean, expected.mean, rtol=1e-14, atol=0)


def test_reasons() -> None:
    found = backend("triton")
    assert found.unsupported(Problem("feature_moments")) is None  # the interpreter
    expected = "the Triton kernels take float32, float16 and bfloat16 features, these are float64"
    assert found.unsupported(Problem("feature_moments", dtype=torch.float64)) == expected
    expected = "the Triton kernels work in GPU memory, the features are on mps"
    assert found.unsupported(Problem("feature_moments", device="mps")) == expected
    assert moments.input_precision(torch.device("cpu")) == "ieee"
    assert moments.input_precision(torch.device("cuda")) == ("tf32x3" if torch.version.hip is None else "ieee")

"""The C++ kernel of running moments: memory, threads, and equal bits on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cortexloop as cl
from cortexloop import _native, ops
from cortexloop._native import moments as native
from moment_problems import MomentProblem, State, exact_moments, random_moments


def solve(problem: MomentProblem) -> State:
    state = problem.state.clone()
    ops.feature_moments(*problem.inputs, state.mean, state.m2, state.cross, "cpu")
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("images", "columns", "neurons"), [(3, 20000, 3), (150, 5000, 17)])
def test_threads_change_nothing(
    isa: str, restore_threads: None, images: int, columns: int, neurons: int, dtype: torch.dtype
):
    problem = random_moments(images, columns, neurons, dtype=dtype, weighted=True)
    cl.set_num_threads(1)
    one = solve(problem)
    for threads in (2, 3):
        cl.set_num_threads(threads)
        assert solve(problem).equals(one)


def test_a_column_does_not_depend_on_its_neighbours(isa: str):
    problem = random_moments(70, 1500, 11)
    whole = solve(problem)
    for part in (slice(0, 1), slice(477, 485), slice(1000, 1500)):
        state = State(*(x[..., part].contiguous() for x in vars(problem.state).values()))
        features = problem.features[:, part].contiguous()
        ops.feature_moments(features, *problem.inputs[1:], state.mean, state.m2, state.cross, "cpu")
        assert state.equals(State(*(x[..., part] for x in vars(whole).values())))


def test_instruction_sets_with_fused_multiplication_agree_to_the_bit(kernels: None):
    """Order of summation is the same; only instruction sets without it round once more."""
    problem = random_moments(200, 1000, 19, dtype=torch.float16)
    before = _native.isa()
    try:
        found = {}
        for name in _native.isas():
            _native.set_isa(name)
            found[name] = solve(problem)
    finally:
        _native.set_isa(before)
    fused = [state for name, state in found.items() if name != "generic"]
    assert all(state.equals(fused[0]) for state in fused)


def margins(x: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """A copy of x, `offset` elements into memory of sentinels, and that memory."""
    memory = torch.full((x.numel() + 128,), 77.0, dtype=x.dtype)
    inside = memory[offset : offset + x.numel()].view(x.shape)
    inside.copy_(x)
    return inside, memory


@pytest.mark.parametrize("offset", [1, 3, 64])
@pytest.mark.parametrize("columns", [1, 47, 49, 481])
def test_reads_and_writes_stay_inside_at_any_alignment(isa: str, columns: int, offset: int):
    problem = exact_moments(20, columns, 9, weighted=True)
    expected = solve(problem)
    features, weights, centred, shift, before, batch = problem.inputs
    assert weights is not None
    read = [margins(x, offset)[0] for x in (features, weights, centred, shift)]
    written = [margins(x, offset) for x in vars(problem.state).values()]
    ops.feature_moments(*read, before, batch, *(x for x, _ in written), "cpu")
    assert expected.equals(State(*(x for x, _ in written)))
    for inside, memory in written:
        outside = torch.cat([memory[:offset], memory[offset + inside.numel() :]])
        assert bool((outside == 77.0).all())


def test_half_precision_at_odd_addresses(isa: str):
    problem = exact_moments(20, 99, 9, dtype=torch.float16)
    expected = solve(problem)
    features, _ = margins(problem.features, 1)
    state = problem.state.clone()
    ops.feature_moments(features, *problem.inputs[1:], state.mean, state.m2, state.cross, "cpu")
    assert expected.equals(state)


def test_images_without_weight_first(isa: str):
    """A whole block of them has no mean to centre at."""
    problem = random_moments(300, 60, 5, weighted=True)
    assert problem.weights is not None
    problem.weights[:140] = 0
    problem.centred[:140] = 0
    rest = slice(140, None)
    total = float(problem.weights.sum())
    arguments = (problem.shift, problem.before, total)
    got, expected = problem.state.clone(), problem.state.clone()
    ops.feature_moments(problem.features, problem.weights, problem.centred, *arguments, *vars(got).values(), "cpu")
    weights, centred = problem.weights[rest].clone(), problem.centred[rest].clone()
    ops.feature_moments(
        problem.features[rest].clone(), weights, centred, *arguments, *vars(expected).values(), "reference"
    )
    for name in ("mean", "m2", "cross"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-5, atol=1e-3)


def test_the_module_checks_its_numbers_too(kernels: None):
    module = _native.cpu()
    x = torch.zeros(64)
    address = x.data_ptr()
    pointers = (address, 0, 0, address, address)
    with pytest.raises(ValueError, match="each be at least 1"):
        module.feature_moments(*pointers, 0.0, 1.0, 0, 1, 1, address, address, address)
    with pytest.raises(ValueError, match="that of the batch above 0"):
        module.feature_moments(*pointers, 0.0, 0.0, 1, 1, 1, address, address, address)
    with pytest.raises(ValueError, match=r"2\^24 images"):
        module.feature_moments(*pointers, 0.0, 1.0, 1 << 30, 1, 1, address, address, address)
    double = torch.zeros(1, 1, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"features should be torch\.float32, "):
        native.feature_moments(double, None, x[:1].view(1, 1), x[:1], 0.0, 1.0, double[0], double[0], x[:1].view(1, 1))

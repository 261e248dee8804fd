"""Streaming moments on a GPU: exact integers, float64, streams and graphs."""

from __future__ import annotations

import pytest
import torch

from cortexloop import BackendError, ops
from cortexloop.testing import error_ratio
from moment_problems import MomentProblem, State, answer, exact_moments, random_moments

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1, 1), (7, 17, 3), (64, 130, 65), (33, 128, 64), (100, 1024, 2), (300, 1027, 70))
# Root mean square error of the products, relative to their own, after thousands of images: tensor cores sum 32 images
# at a time, and what that loses is seen on hardware only.
ROUNDING = 2e-6


def update(problem: MomentProblem, state: State, engine: str) -> None:
    ops.feature_moments(*problem.inputs, state.mean, state.m2, state.cross, backend=engine)


def updated(problem: MomentProblem, engine: str) -> State:
    state = problem.state.clone()
    update(problem, state, engine)
    return state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_exact(gpu_engine: str, device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for weighted, times_before in ((False, 3), (True, 1), (True, 0)):
        problem = exact_moments(*shape, dtype=dtype, weighted=weighted, times_before=times_before)
        expected = answer(problem)
        got = updated(problem.to(device), gpu_engine).to(torch.device("cpu"))
        assert got.equals(State(expected.mean, expected.m2, expected.cross.float())), (weighted, times_before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 1000, 64), (3000, 515, 20)], ids=str)
def test_moments_close(gpu_engine: str, device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    problem = random_moments(*shape, dtype=dtype, weighted=True).to(device)
    got, expected = updated(problem, gpu_engine), answer(problem)
    ratio = error_ratio(got.cross, answer(problem, torch.float32).cross, expected.cross)
    error = float((got.cross - expected.cross).square().mean().sqrt() / expected.cross.square().mean().sqrt())
    print(f"{gpu_engine}, {shape}, {dtype}: {ratio:.3g} times the error of float32 torch, {error:.3g} of the products")
    assert ratio < 1.0
    assert error < ROUNDING
    assert torch.allclose(got.m2, expected.m2, rtol=1e-6, atol=0)
    spread = (expected.m2 / (problem.before + problem.batch)).sqrt()
    assert ((got.mean - expected.mean).abs() / spread).max() < 1e-6


def test_moments_are_the_same_in_every_run(gpu_engine: str, device: torch.device) -> None:
    """And for columns by themselves, whose rows begin elsewhere."""
    problem = random_moments(200, 1024, 66).to(device)
    expected = updated(problem, gpu_engine)
    for _ in range(5):
        assert updated(problem, gpu_engine).equals(expected)
    part = slice(129, 518)
    state = problem.state
    some = MomentProblem(
        problem.features[:, part].contiguous(),
        *problem.inputs[1:],
        State(state.mean[part].clone(), state.m2[part].clone(), state.cross[:, part].contiguous()),
    )
    got = updated(some, gpu_engine)
    assert torch.equal(got.mean, expected.mean[part])
    if gpu_engine == "cuda":  # Triton's compiler may choose other instructions where rows are not aligned
        assert got.equals(State(expected.mean[part], expected.m2[part], expected.cross[:, part]))


def test_moments_on_a_side_stream(gpu_engine: str, real_gpu: torch.device) -> None:
    problem = random_moments(64, 5000, 64).to(real_gpu)
    expected = updated(problem, gpu_engine)
    lane = torch.cuda.Stream(real_gpu)
    lane.wait_stream(torch.cuda.current_stream(real_gpu))
    with torch.cuda.stream(lane):
        state = problem.state.clone()
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
        state.mean.fill_(0)
        state.mean += problem.state.mean  # what the launch has to wait for
        update(problem, state, gpu_engine)
    torch.cuda.current_stream(real_gpu).wait_stream(lane)
    assert state.equals(expected)


def test_moments_in_a_graph(gpu_engine: str, real_gpu: torch.device) -> None:
    """Captured once; each replay adds the batch that the buffer then holds, with the weights of the capture."""
    problems = [random_moments(64, 3000, 64, seed=seed).to(real_gpu) for seed in range(3)]
    first = problems[0]
    static, centred = first.features.clone(), first.centred.clone()
    given = MomentProblem(static, None, centred, first.shift, first.before, first.batch, first.state)
    updated(given, gpu_engine)  # compiles
    state = first.state.clone()
    torch.cuda.synchronize(real_gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(given, state, gpu_engine)
    expected = first.state.clone()
    for problem in problems:
        static.copy_(problem.features)
        centred.copy_(problem.centred)
        graph.replay()
        update(given, expected, gpu_engine)
    assert state.equals(expected)


def test_auto_takes_the_kernels(gpu_engine: str, real_gpu: torch.device) -> None:
    problem = exact_moments(5, 9, 2).to(real_gpu)
    expected = answer(problem)
    assert updated(problem, "auto").equals(State(expected.mean, expected.m2, expected.cross.float()))
    wrong = MomentProblem(problem.features.double(), *problem.inputs[1:], problem.state)
    with pytest.raises(BackendError, match="float64"):
        updated(wrong, gpu_engine)

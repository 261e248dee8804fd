"""Streaming moments: the CUDA kernel's own source, executed on the CPU."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest
import torch
from emulated_build import Settings
from emulated_moments import emulated_moments
from torch import Tensor

from cortexloop import BackendError, _native, ops
from cortexloop.backends.registry import Problem, backend
from cortexloop.testing import error_ratio
from moment_problems import MomentProblem, State, answer, exact_moments, random_moments

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Images, columns, neurons: one of everything; odd rows; several blocks of columns, neurons and images with remainders.
SHAPES = ((1, 1, 1), (7, 17, 3), (64, 130, 65), (33, 128, 64), (40, 5, 64), (100, 136, 2), (1, 130, 129))
ROUNDING = 4e-7  # of the products, relative to their root mean square


def same(got: State, expected: State) -> bool:
    """Whether a state has the bits of a float64 one that needed no rounding."""
    return got.equals(State(expected.mean, expected.m2, expected.cross.float()))


@pytest.mark.parametrize("at_start", [False, True], ids=["ends-at-a-page", "starts-at-a-page"])
@pytest.mark.parametrize("align", [None, 16], ids=["anywhere", "aligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact(
    emulated_cuda: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype, align: int | None, at_start: bool
) -> None:
    """Every buffer lies between pages without access, inputs are read-only."""
    for weighted, times_before in ((False, 3), (True, 1), (True, 0)):
        problem = exact_moments(*shape, dtype=dtype, weighted=weighted, times_before=times_before)
        got = emulated_moments(emulated_cuda, problem, align=align, at_start=at_start)
        assert same(got, answer(problem)), (weighted, times_before)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 17, 3), (7, 130, 65), (64, 130, 64), (1000, 128, 20)], ids=str)
def test_close(emulated_cuda: ModuleType, shape: tuple[int, int, int], dtype: torch.dtype, weighted: bool) -> None:
    """As accurate as float32 products can be, and closer to float64 than float32 moments are."""
    problem = random_moments(*shape, dtype=dtype, weighted=weighted)
    got, expected = emulated_moments(emulated_cuda, problem), answer(problem)
    assert error_ratio(got.cross, answer(problem, torch.float32).cross, expected.cross) < 0.5
    error = (got.cross - expected.cross).square().mean().sqrt()
    assert error < ROUNDING * expected.cross.square().mean().sqrt()
    spread = (expected.m2 / (problem.before + problem.batch)).sqrt()
    assert ((got.mean - expected.mean).abs() / spread).max() < 1e-7
    assert ((got.m2 - expected.m2).abs() / expected.m2).max() < 2e-7


def test_batches_add_up(emulated_cuda: ModuleType) -> None:
    """Batches of several sizes, one after the other, against one pass over all images."""
    whole = random_moments(120, 40, 5, weighted=True)
    y = torch.randn(120, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3
    assert whole.weights is not None
    w = whole.weights.double()
    state = State(torch.zeros(40).double(), torch.zeros(40).double(), torch.zeros(5, 40))
    before, running = 0.0, torch.zeros(5, dtype=torch.float64)
    for part in torch.arange(120).split([50, 1, 64, 5]):
        total = float(w[part].sum())
        centre = w[part] @ y[part] / total
        problem = MomentProblem(
            features=whole.features[part].contiguous(),
            weights=whole.weights[part].contiguous(),
            centred=(w[part, None] * (y[part] - centre)).float(),
            shift=(centre - running).float(),
            before=before,
            batch=total,
            state=state,
        )
        state = emulated_moments(emulated_cuda, problem)
        running += (centre - running) * total / (before + total)
        before += total
    x = whole.features.double()
    mean = w @ x / before
    cross = (w[:, None] * (y - running)).mT @ (x - mean)
    assert torch.allclose(state.mean, mean, rtol=0, atol=1e-7)
    assert torch.allclose(state.m2, w @ (x - mean).square(), rtol=1e-6)
    assert (state.cross - cross).abs().max() < 1e-6 * cross.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_column_has_no_spread(emulated_cuda: ModuleType, dtype: torch.dtype) -> None:
    """0.1 is no dyadic number in any dtype; dead features are found by m2 == 0."""
    problem = random_moments(77, 20, 3, dtype=dtype, weighted=True)
    problem.features[:, ::3] = 0.1
    zeros = State(*(torch.zeros_like(x) for x in vars(problem.state).values()))
    got = emulated_moments(emulated_cuda, dataclasses.replace(problem, before=0.0, state=zeros))
    constant = (problem.features == problem.features[0]).all(dim=0)
    assert constant.sum() in range(7, 20)
    assert torch.equal(got.m2 == 0, constant)
    assert torch.equal(got.mean[::3], problem.features[0, ::3].double())
    assert (got.cross[:, ::3] == 0).all()


def test_a_column_depends_on_itself_alone(emulated_cuda: ModuleType) -> None:
    """On neither its neighbours nor how rows are aligned; NaN stays where it is. The same for neurons."""
    problem = random_moments(50, 136, 66)
    whole = emulated_moments(emulated_cuda, problem, align=16)
    p, state = problem, problem.state
    part = slice(30, 131)
    some = dataclasses.replace(
        p,
        features=p.features[:, part].contiguous(),
        centred=p.centred[:, 3:8].contiguous(),
        shift=p.shift[3:8].contiguous(),
        state=State(state.mean[part], state.m2[part], state.cross[3:8, part].contiguous()),
    )
    got = emulated_moments(emulated_cuda, some)
    assert got.equals(State(whole.mean[part], whole.m2[part], whole.cross[3:8, part]))
    broken = dataclasses.replace(p, features=p.features.clone())
    broken.features[20, 7] = float("nan")
    broken.features[40, 9] = float("inf")
    got = emulated_moments(emulated_cuda, broken)
    bad = torch.zeros(136, dtype=torch.bool)
    bad[[7, 9]] = True
    for x, expected in zip(vars(got).values(), vars(whole).values(), strict=True):
        assert not x[..., bad].isfinite().any()
        assert torch.equal(x[..., ~bad], expected[..., ~bad])


def test_bits_do_not_depend_on_the_order_of_execution(emulated_cuda: ModuleType, emulated_device: Settings) -> None:
    problems = [random_moments(70, 130, 65, dtype=dtype, weighted=True) for dtype in DTYPES]
    expected = [emulated_moments(emulated_cuda, problem) for problem in problems]
    for schedule in (1, 2, 3):
        emulated_device["schedule"] = schedule
        for problem, wanted in zip(problems, expected, strict=True):
            assert emulated_moments(emulated_cuda, problem).equals(wanted), schedule


@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("align", [None, 16], ids=["anywhere", "aligned"])
def test_no_races(emulated_checked_cuda: ModuleType, align: int | None, schedule: int) -> None:
    """No access that a barrier should order and does not, none to a place that is being copied to, none misaligned."""
    settings = Settings(emulated_checked_cuda.__file__)
    with settings.restored():
        settings["schedule"] = schedule
        for dtype in DTYPES:
            problem = random_moments(100, 136, 68, dtype=dtype, weighted=True)
            emulated_moments(emulated_checked_cuda, problem, align=align)
        emulated_moments(emulated_checked_cuda, random_moments(3, 1, 1))


@pytest.mark.parametrize("shared_memory", [99, 163, 227], ids=lambda n: f"{n} KB")
def test_one_launch_on_every_device(emulated_cuda: ModuleType, emulated_device: Settings, shared_memory: int) -> None:
    problem = exact_moments(40, 300, 4)
    emulated_device["shared_memory"] = shared_memory * 1024
    launches, blocks = emulated_device["launches"], emulated_device["blocks"]
    assert same(emulated_moments(emulated_cuda, problem), answer(problem))
    assert emulated_device["launches"] - launches == 1
    assert emulated_device["blocks"] - blocks == 3


def test_misuse(emulated_cuda: ModuleType, emulated_device: Settings) -> None:
    problem = exact_moments(5, 6, 2)
    emulated_device["fail_launch"] = 701
    with pytest.raises(RuntimeError, match="feature_moments_kernel failed: too many resources requested for launch"):
        emulated_moments(emulated_cuda, problem)
    assert same(emulated_moments(emulated_cuda, problem), answer(problem))
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        emulated_cuda.feature_moments(16, 0, 0, 16, 16, 0.0, 1.0, 1, 1, 1, 16, 16, 16, 7, 0)
    for sizes, sentence in (
        ((0.0, 1.0, 0, 1, 1), "feature_moments: 0 images, 1 columns and 1 neurons, 1 at least expected"),
        ((0.0, 1.0, 1, 1 << 40, 1), "feature_moments: 1099511627776 columns are more than one launch takes"),
        ((-1.0, 1.0, 1, 1, 1), "feature_moments: weights of -1 before and 1 in the batch"),
        ((0.0, float("nan"), 1, 1, 1), "feature_moments: weights of 0 before and nan in the batch"),
    ):
        with pytest.raises(ValueError, match=sentence):
            emulated_cuda.feature_moments(16, 0, 0, 16, 16, *sizes, 16, 16, 16, 0, 0)


@pytest.fixture
def device_is_the_cpu(emulated_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The "cuda" backend takes tensors in host memory."""
    monkeypatch.setattr(_native, "cuda", lambda: emulated_cuda)
    monkeypatch.setattr(_native, "cuda_unavailable", lambda: emulated_cuda.unavailable() or None)


def updated(problem: MomentProblem, **options: str) -> State:
    state = problem.state.clone()
    ops.feature_moments(*problem.inputs, state.mean, state.m2, state.cross, **options)
    return state


@pytest.mark.usefixtures("device_is_the_cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator(dtype: torch.dtype) -> None:
    for weighted in (False, True):
        problem = exact_moments(20, 31, 4, dtype=dtype, weighted=weighted)
        assert updated(problem, backend="cuda").equals(updated(problem, backend="reference"))


@pytest.mark.usefixtures("device_is_the_cpu")
def test_reasons(emulated_device: Settings) -> None:
    found = backend("cuda")
    assert found.unsupported(Problem("feature_moments")) is None
    assert found.note(Problem("feature_moments")) == "emulated device; products of tf32 pairs, as accurate as float32"
    expected = "the CUDA kernels take float32, float16 and bfloat16 features, these are float64"
    assert found.unsupported(Problem("feature_moments", dtype=torch.float64)) == expected
    expected = "the CUDA kernels work in GPU memory, the features are on mps"
    assert found.unsupported(Problem("feature_moments", device="mps")) == expected
    emulated_device["major"] = 7
    expected = "the CUDA kernels need compute capability 8.0 or higher, device 0 has 7.0"
    assert found.unsupported(Problem("feature_moments")) == expected
    with pytest.raises(BackendError, match=expected):
        updated(exact_moments(2, 3, 1), backend="cuda")
    emulated_device["devices"] = 0
    assert found.unsupported(Problem("feature_moments")) == "this machine has no NVIDIA GPU that CUDA can see"


@pytest.mark.usefixtures("fake_cuda")
def test_pointers_are_checked() -> None:
    from cortexloop._native.moments_gpu import feature_moments

    problem = exact_moments(4, 6, 2)
    mean, m2, cross = vars(problem.state).values()

    def call(features: Tensor = problem.features, centred: Tensor = problem.centred, mean: Tensor = mean) -> None:
        feature_moments(features, None, centred, problem.shift, 0.0, 4.0, mean, m2, cross)

    with pytest.raises(TypeError, match=r"features should be torch.float32, torch.float16 or .*, got torch.float64"):
        call(features=problem.features.double())
    with pytest.raises(ValueError, match=r"centred should be contiguous, got strides \[1, 4\]"):
        call(centred=problem.centred.mT.contiguous().mT)
    with pytest.raises(TypeError, match=r"mean should be torch.float64, got torch.float32"):
        call(mean=mean.float())
    with pytest.raises(ValueError, match=r"mean should have shape \[6\], got \[5\]"):
        call(mean=mean[:5])

"""What holds for every optimiser: bits that no batch, thread, engine or interruption changes; what NaN means."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_optimisers import NAMES, run, same_bits, scores_of, small, through_files
from torch._subclasses.fake_tensor import FakeTensorMode

import cortexloop as cl

every = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tensors are small here: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@every
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bits_do_not_depend_on_the_split(name: str, data: st.DataObject):
    dim = data.draw(st.sampled_from([2, 5, 64, 100]), "dim")
    population = 2 * data.draw(st.integers(1, 12), "half of the population")
    problems = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=7, unique=True), "problems")
    cuts = sorted(data.draw(st.sets(st.integers(1, len(problems) - 1)), "cuts"))
    missing = data.draw(st.sampled_from([0.0, 0.3, 0.8]), "missing")

    def codes(ids: list[int]) -> list[torch.Tensor]:
        return run(small(name, dim, problems=ids, population=population, seed=5), 4, missing=missing)

    together = codes(problems)
    parts = [codes(problems[a:b]) for a, b in zip([0, *cuts], [*cuts, len(problems)], strict=True)]
    assert same_bits(together, [torch.cat(generation) for generation in zip(*parts, strict=True)])


def sizes() -> Iterator[tuple[str, int]]:
    """A small and a large dimension for each, the large one as far as it takes no seconds."""
    for name in NAMES:
        yield name, 20
        if name != "cholesky-cma-dense":  # becomes dense after as many generations as dimensions
            yield name, 300 if name == "hessian-cma" else 700


@pytest.mark.parametrize(("name", "dim"), list(sizes()))
def test_bits_do_not_depend_on_the_number_of_threads(name: str, dim: int, restore_threads: None):
    ours = []
    for threads in (1, 2, 3):
        cl.set_num_threads(threads)
        torch.set_num_threads(threads)
        generations = 24 if dim == 20 else 3
        ours.append(run(small(name, dim, problems=3, population=16, seed=1), generations, missing=0.1))
    assert same_bits(ours[0], ours[1])
    assert same_bits(ours[0], ours[2])


@every
@pytest.mark.parametrize("dim", [3, 64, 150])
def test_every_instruction_set_gives_the_bits_of_the_reference(name: str, dim: int, isa: str):
    with cl.use_backend("reference"):
        expected = run(small(name, dim, problems=2, population=10, seed=2), 5, missing=0.2)
    with cl.use_backend("cpu"):
        assert same_bits(run(small(name, dim, problems=2, population=10, seed=2), 5, missing=0.2), expected)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("asked", [False, True], ids=["told", "asked"])
def test_resumes_at_any_point_with_the_same_bits(name: str, dtype: torch.dtype, asked: bool):
    def fresh() -> cl.evolve.Optimiser:
        return small(name, 5, problems=3, population=8, seed=9, dtype=dtype)

    with cl.use_backend("reference"):
        uninterrupted = fresh()
        expected = run(uninterrupted, 7, missing=0.3)
        for stop in range(7):
            first = fresh()
            run_without_asking(first, stop)
            if asked:
                first.ask()
            second = fresh()
            second.load_state_dict(through_files(first.state_dict()))
            assert second.generation == stop
            assert same_bits(run(second, 7 - stop, missing=0.3), expected[stop:])
            for ours, theirs in zip(vars(second.best).values(), vars(uninterrupted.best).values(), strict=True):
                assert torch.equal(ours, theirs)
            assert torch.equal(second.centre, uninterrupted.centre)


def run_without_asking(optimiser: cl.evolve.Optimiser, generations: int) -> None:
    """As `run`, but the next generation is not asked for."""
    for _ in range(generations):
        optimiser.tell(scores_of(optimiser, optimiser.ask(), missing=0.3))


@every
def test_resumes_with_injected_codes_and_a_first_generation(name: str, rng: np.random.Generator):
    first, extra = rng.normal(size=(6, 5)), rng.normal(size=(2, 3, 5))

    def fresh() -> cl.evolve.Optimiser:
        return small(name, 5, problems=2, population=8, first_generation=first)

    def script(stop: int) -> list[torch.Tensor]:
        """Three generations, with a resume before the step numbered `stop`."""
        optimiser, shown = fresh(), []
        for step in range(9):
            if step == stop:
                other = small(name, 5, problems=2, population=8)
                other.load_state_dict(through_files(optimiser.state_dict()))
                optimiser = other
            if step % 3 == 0 and step != 6:
                optimiser.inject(extra[:, : step + 1] if step else extra[:, :1])
            elif step % 3 == 1:
                shown.append(optimiser.ask().clone())
            elif step % 3 == 2:
                optimiser.tell(scores_of(optimiser, optimiser.ask()))
        return [*shown, optimiser.ask()]

    extra = np.repeat(extra, 2, axis=1)
    expected = script(-1)
    for stop in range(9):
        assert same_bits(script(stop), expected), stop


@every
def test_a_problem_of_which_nothing_was_shown_keeps_its_state(name: str):
    with_gap = small(name, 8, problems=[3, 4], population=6)
    run_without_asking(with_gap, 3)
    before = {key: value.clone() for key, value in with_gap.state_dict()["tensors"].items()}
    scores = scores_of(with_gap, with_gap.ask())
    scores[1] = np.nan
    with_gap.tell(scores)
    after = with_gap.state_dict()["tensors"]
    assert with_gap.generation == 4
    for key, value in before.items():
        # The factors of the covariance get an empty row for the problem that has nothing to learn.
        now = after[key][1]
        assert torch.equal(now[: len(value[1])] if key in ("_v", "_u", "_q") else now, value[1]), key
    assert any(not torch.equal(after[key][0], value[0]) for key, value in before.items() if key not in ("_v", "_u"))
    assert torch.isfinite(with_gap.ask()).all()


@every
def test_nothing_ever_shown(name: str):
    optimiser = small(name, 8, problems=2, population=6)
    start = optimiser.centre.clone()
    for _ in range(3):
        optimiser.tell(np.full(optimiser.ask().shape[:2], np.nan))
    assert torch.equal(optimiser.centre, start)
    assert torch.isfinite(optimiser.ask()).all()
    assert optimiser.best.generation.tolist() == [-1, -1]
    run_without_asking(optimiser, 2)
    assert torch.isfinite(optimiser.best.scores).all()


@every
@pytest.mark.parametrize("shift", [-4096.0, 4096.0])
def test_a_constant_added_to_all_scores_changes_nothing(name: str, shift: float):
    """So a code that was not shown does not count as zero, or as any other number."""
    keywords = {"baseline": True} if name == "nes" else {}
    plain, shifted = (small(name, 8, problems=2, population=10, **keywords) for _ in range(2))
    for _ in range(6):
        codes = plain.ask()
        assert torch.equal(shifted.ask(), codes)
        # Multiples of 1/8, so that the sum is exact.
        scores = np.round(scores_of(plain, codes, missing=0.3) * 8) / 8
        plain.tell(scores)
        shifted.tell(scores + shift)
    assert torch.equal(shifted.ask(), plain.ask())
    assert torch.equal(shifted.best.codes, plain.best.codes)
    assert torch.equal(shifted.best.scores, plain.best.scores + shift)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ga-xdream"])  # which carries them over
def test_codes_not_shown_have_no_say(name: str):
    """Where codes are that were not shown makes no difference: not to the update, not to the best."""
    injected = torch.tensor([[3.0, -1.0, 2.0, 0.5], [1e3, 1e3, -1e3, 1e3]])
    updates = []
    for codes in injected:
        optimiser = small(name, 4, population=8)
        run_without_asking(optimiser, 2)
        optimiser.inject(codes[None])
        scores = scores_of(optimiser, optimiser.ask())
        scores[:, 0] = np.nan
        optimiser.tell(scores)
        updates.append([optimiser.centre.clone(), optimiser.ask(), optimiser.best.codes])
    assert same_bits(*updates)


@every
def test_minimising_mirrors_maximising(name: str):
    keywords = {"problems": 2, "population": 8}
    up, down = small(name, 6, **keywords), small(name, 6, minimise=True, **keywords)
    for _ in range(5):
        codes = up.ask()
        assert torch.equal(codes, down.ask())
        scores = scores_of(up, codes, missing=0.2)
        up.tell(scores)
        down.tell(-scores)
    assert torch.equal(up.ask(), down.ask())
    assert torch.equal(up.best.codes, down.best.codes)
    assert torch.equal(up.best.scores, -down.best.scores)
    assert torch.equal(up.best.generation, down.best.generation)


@every
def test_repeats_are_averaged_without_the_missing_ones(name: str, rng: np.random.Generator):
    once, often = (small(name, 6, problems=2, population=8) for _ in range(2))
    for _ in range(4):
        codes = once.ask()
        assert torch.equal(codes, often.ask())
        repeats = rng.integers(-40, 40, size=(*codes.shape[:2], 4)).astype(float)
        repeats[rng.random(repeats.shape) < 0.4] = np.nan
        shown = ~np.isnan(repeats).all(2)
        mean = np.where(shown, np.nansum(repeats, 2) / np.maximum((~np.isnan(repeats)).sum(2), 1), np.nan)
        once.tell(mean)
        often.tell(repeats)
    assert torch.equal(once.ask(), often.ask())


@every
def test_asks_into_memory_of_the_caller(name: str):
    plain, other = (small(name, 9, problems=2, population=6) for _ in range(2))
    for _ in range(3):
        out = torch.full((2, other.codes_next, 9), torch.nan)
        assert other.ask(out=out) is out
        assert torch.equal(out, plain.ask())
        scores = scores_of(plain, plain.ask(), missing=0.2)
        plain.tell(scores)
        other.tell(scores)
        out.fill_(torch.nan)
    assert torch.equal(other.ask(), plain.ask())


@every
def test_seeds_and_problems_differ(name: str):
    first, second = (small(name, 6, problems=[0, 1], seed=seed) for seed in (0, 1))
    a, b = first.ask(), second.ask()
    skip = 0 if not name.startswith("sphere") else 1
    assert not (a[0, skip:] == a[1, skip:]).any()
    assert not (a == b).any()
    run_without_asking(first, 1)
    assert not torch.equal(first.ask()[:, :5], a[:, :5])


@every
def test_float64_follows_float32(name: str):
    """The same run but for rounding, as long as no rank changes."""
    with cl.use_backend("reference"):
        single, double = (
            run(small(name, 7, problems=2, population=8, dtype=dtype), 3, missing=0.2)
            for dtype in (torch.float32, torch.float64)
        )
    for ours, theirs in zip(single, double, strict=True):
        assert torch.allclose(ours.double(), theirs, rtol=0, atol=2e-5)


@every
def test_on_a_device_nothing_is_read_and_nothing_is_mixed(name: str):
    """Fake tensors have shapes and a device but no values, so no GPU is needed to see what would wait for one.

    Reading a value on the host and mixing devices raise. Arguments are checked by value, so the optimiser is made, and
    told what to inject, on the CPU.
    """
    optimiser = small(name, 16, problems=3, population=8)
    run_without_asking(optimiser, 1)
    optimiser.inject(np.ones((3, 2, 16)))
    with FakeTensorMode():
        without_values(optimiser)
        for repeats in ((), (4,), ()):
            codes = optimiser.ask()
            assert codes.shape == (3, optimiser.codes_next, 16)
            assert codes.device == ELSEWHERE
            optimiser.tell(torch.empty(*codes.shape[:2], *repeats, device=ELSEWHERE))
        for tensor in (optimiser.centre, *vars(optimiser.best).values()):
            assert tensor.device == ELSEWHERE


ELSEWHERE = torch.device("meta")


def without_values(owner: object) -> None:
    """Move all tensors that an object of this package holds, at any depth, to a device without values."""
    held = owner if isinstance(owner, dict) else vars(owner)
    for name, value in held.items():
        if isinstance(value, torch.Tensor):
            held[name] = torch.empty(value.shape, dtype=value.dtype, device=ELSEWHERE)
        elif isinstance(value, torch.device):
            held[name] = ELSEWHERE
        elif isinstance(value, dict) or type(value).__module__.startswith("cortexloop"):
            without_values(value)


def test_reading_or_mixing_would_be_noticed():
    with FakeTensorMode():
        there = torch.ones(3, device=ELSEWHERE)
        with pytest.raises(RuntimeError, match="device"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError):
            bool(there.sum() > 0)
        with pytest.raises(RuntimeError):
            there.numpy()

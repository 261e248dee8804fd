"""The closed loop: what is told is what was scored, in any split; noise, references, checkpoints and stopping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cortexloop as cl
from cortexloop import evolve
from cortexloop.textbook import textbook_neurons

DIM = 60
SIZE = (112, 112)


@pytest.fixture(scope="module")
def bank() -> cl.ModelBank:
    return cl.ModelBank.from_weights(textbook_neurons())


def generator() -> evolve.Generator:
    return evolve.FourierGenerator(*SIZE, dim=DIM)


def optimiser(n: int = 3, population: int = 6, **options: Any) -> evolve.CholeskyCMA:
    return evolve.CholeskyCMA(DIM, problems=n, population=population, seed=4, **options)


def evolution(bank: cl.ModelBank, neurons: list[int], **options: Any) -> evolve.Evolution:
    made = options.pop("optimiser", None) or optimiser(len(neurons))
    return evolve.Evolution(evolve.BankObjective(bank, neurons), made, generator(), **options)


def test_each_problem_is_scored_by_its_own_neuron(bank: cl.ModelBank):
    run = evolution(bank, [4, 0, 4])
    codes = run.optimiser.ask().clone()
    generation = run.step()
    images = evolve.to_uint8(run.generator(codes))
    all_responses = cl.responses(images.flatten(0, 1).numpy(), bank).reshape(3, 6, -1)
    expected = np.stack([all_responses[p, :, neuron] for p, neuron in enumerate([4, 0, 4])])
    np.testing.assert_array_equal(generation.scores, expected.astype(np.float64))
    np.testing.assert_array_equal(generation.clean, generation.scores)
    assert generation.index == 0
    np.testing.assert_allclose(generation.code_norm, np.linalg.norm(codes.numpy(), axis=2).mean(1), rtol=1e-6)
    assert set(generation.seconds) == {"generate", "score", "optimise"}
    assert run.history == [generation]


def test_the_split_into_groups_changes_nothing(bank: cl.ModelBank, monkeypatch: pytest.MonkeyPatch):
    whole = evolution(bank, [0, 1, 2, 3, 4])
    whole.run(3)
    monkeypatch.setattr(evolve.evolution, "IMAGES_AT_ONCE", 7)
    parts = evolution(bank, [0, 1, 2, 3, 4])
    parts.run(3)
    alone = evolution(bank, [3], optimiser=evolve.CholeskyCMA(DIM, problems=[3], population=6, seed=4))
    alone.run(3)
    for a, b, c in zip(whole.history, parts.history, alone.history, strict=True):
        np.testing.assert_array_equal(a.scores, b.scores)
        np.testing.assert_array_equal(a.scores[3:4], c.scores)


def test_evolution_climbs(bank: cl.ModelBank):
    run = evolution(bank, list(range(len(bank))), optimiser=optimiser(len(bank), 16))
    run.run(15)
    first, last = run.history[0].scores.mean(1), run.history[-1].scores.mean(1)
    assert (last > first).all()
    best = run.optimiser.best
    np.testing.assert_allclose(run.clean_scores(best.codes[:, None])[:, 0].numpy(), best.scores.numpy(), rtol=1e-6)


def test_minimising_descends(bank: cl.ModelBank):
    run = evolution(bank, [0, 1], optimiser=optimiser(2, 16, minimise=True))
    run.run(15)
    assert (run.history[-1].scores.mean(1) < run.history[0].scores.mean(1)).all()


def test_multiplicative_noise_is_as_defined(bank: cl.ModelBank):
    run = evolution(bank, [0, 1], noise=evolve.MultiplicativeNoise(0.5), repeats=200, seed=9)
    generation = run.step()
    assert generation.clean is not None
    share = generation.scores / generation.clean
    assert np.abs(share - 1).max() < 5 * 0.5 / np.sqrt(200)
    assert np.abs(share - 1).max() > 0.005
    noise = evolve.MultiplicativeNoise(2.0)
    trials = noise(torch.tensor([[3.0, -1.0]]).double(), torch.tensor([7]), 0, 4000, 1, 128)
    assert tuple(trials.shape) == (1, 2, 4000)
    assert float(trials[0, 0].min()) == 0.0
    assert float(trials[0, 1].max()) == 0.0
    # E max(0, 1 + s z) = Phi(1/s) + s phi(1/s) for s = 2
    assert float(trials[0, 0].mean()) / 3 == pytest.approx(0.69146 + 2 * 0.35207, abs=0.1)


def test_poisson_noise_has_the_mean_and_variance_of_counts():
    noise = evolve.PoissonNoise(spikes_per_unit=4.0)
    clean = torch.tensor([[0.0, 0.5, 2.5, 100.0, -3.0]]).double()
    trials = noise(clean, torch.tensor([3]), 5, 20_000, 11, 128) * 4
    counts = trials[0].numpy()
    assert (counts == np.rint(counts)).all()
    assert (counts[[0, 4]] == 0).all()
    for row, rate in ((1, 2.0), (2, 10.0), (3, 400.0)):
        assert counts[row].mean() == pytest.approx(rate, abs=5 * np.sqrt(rate / 20_000))
        assert counts[row].var() == pytest.approx(rate, rel=0.06)
    assert (counts[1] == 0).mean() == pytest.approx(np.exp(-2), abs=0.012)
    assert noise(torch.full((1, 1), torch.nan).double(), torch.tensor([0]), 0, 2, 0, 128).isnan().all()
    with pytest.raises(ValueError, match="expects 4000 spikes per presentation, more than the 700"):
        noise(torch.full((1, 1), 1000.0).double(), torch.tensor([0]), 0, 1, 0, 128)


def test_references_are_scored_in_every_generation(bank: cl.ModelBank, rng: np.random.Generator):
    references = rng.integers(0, 256, (4, *SIZE, 3), dtype=np.uint8)
    clean = evolution(bank, [2, 5], references=references)
    clean.run(2)
    expected = cl.responses(references, bank)[:, [2, 5]].T
    for generation in clean.history:
        np.testing.assert_array_equal(generation.reference_scores, expected)
    noisy = evolution(bank, [2, 5], references=references, noise=evolve.MultiplicativeNoise(0.3))
    noisy.run(2)
    first, second = (g.reference_scores for g in noisy.history)
    assert first is not None
    assert second is not None
    assert (first != expected).all()
    assert (first != second).all()


def test_a_callback_gets_uint8_images_with_references_last(rng: np.random.Generator):
    references = rng.integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
    seen: list[tuple[Tensor, int]] = []

    def rig(images: Tensor, generation: int) -> np.ndarray[Any, Any]:
        seen.append((images, generation))
        scores = np.stack([images.float().mean(dim=(2, 3, 4)).numpy()] * 3, axis=2)
        scores[:, 1] = np.nan
        scores[:, 2, 0] = np.nan
        return scores

    run = evolve.Evolution(rig, optimiser(2), generator(), references=references)
    codes = run.optimiser.ask().clone()
    generation = run.step()
    images, index = seen[0]
    assert index == 0
    assert images.dtype == torch.uint8
    assert tuple(images.shape) == (2, 8, *SIZE, 3)
    assert torch.equal(images[:, :6], run.render(codes))
    assert torch.equal(images[1, 6:], torch.from_numpy(references))
    assert generation.clean is None
    assert generation.reference_scores is not None
    assert np.isnan(generation.scores[:, 1]).all()
    assert np.isfinite(np.delete(generation.scores, 1, axis=1)).all()
    with pytest.raises(TypeError, match="no clean scores"):
        run.clean_scores(codes)


def states(run: evolve.Evolution) -> str:
    state = run.optimiser.state_dict()
    return json.dumps(
        {**state, "tensors": {k: np.asarray(v).tobytes().hex() for k, v in state["tensors"].items()}}, sort_keys=True
    )


def test_a_resumed_run_has_the_same_bits(bank: cl.ModelBank, tmp_path: Path):
    def make() -> evolve.Evolution:
        return evolution(bank, [0, 1, 2], noise=evolve.MultiplicativeNoise(0.2), repeats=2, seed=3)

    straight = make()
    straight.run(7)
    first = make()
    first.run(3, checkpoint=tmp_path / "c.ckpt")
    first.optimiser.ask()
    first.save(tmp_path / "c.ckpt")
    second = make()
    second.load(tmp_path / "c.ckpt")
    assert [g.index for g in second.history] == [0, 1, 2]
    assert [g.index for g in second.run(7)] == [3, 4, 5, 6]
    assert states(second) == states(straight)
    for a, b in zip(straight.history, second.history, strict=True):
        np.testing.assert_array_equal(a.scores, b.scores)
        np.testing.assert_array_equal(a.clean, b.clean)


def test_a_checkpoint_of_another_run_is_refused(bank: cl.ModelBank, tmp_path: Path):
    path = tmp_path / "c.ckpt"
    run = evolution(bank, [0, 1, 2])
    run.run(2, checkpoint=path)
    for other, named in (
        (evolution(bank, [0, 1, 3]), "objective.neurons"),
        (evolution(bank, [0, 1, 2], optimiser=optimiser(3, 7)), "optimiser.population"),
        (evolution(bank, [0, 1, 2], noise=evolve.MultiplicativeNoise(0.2)), "noise"),
        (evolution(bank, [0, 1, 2], seed=1), "seed"),
    ):
        before = states(other)
        with pytest.raises(ValueError, match=f"belongs to another run: its {named}"):
            other.load(path)
        assert states(other) == before
        assert other.history == []


def test_a_damaged_checkpoint_is_refused(bank: cl.ModelBank, tmp_path: Path):
    path = tmp_path / "c.ckpt"
    run = evolution(bank, [0])
    run.run(2, checkpoint=path)
    good = path.read_bytes()
    for size in (0, 5, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(ValueError, match="cannot be used"):
            evolution(bank, [0]).load(path)
    with pytest.raises(FileNotFoundError):
        run.load(tmp_path / "absent")


def test_an_interrupted_update_cannot_be_saved(bank: cl.ModelBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = evolution(bank, [0])
    run.run(1, checkpoint=tmp_path / "c.ckpt")

    def interrupt(scores: Tensor) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.optimiser, "tell", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.step()
    monkeypatch.undo()
    for action in (lambda: run.save(tmp_path / "c.ckpt"), run.step):
        with pytest.raises(RuntimeError, match="interrupted half way"):
            action()
    run.load(tmp_path / "c.ckpt")
    assert run.step().index == 1


def test_an_interruption_before_the_update_loses_nothing(bank: cl.ModelBank, monkeypatch: pytest.MonkeyPatch):
    run, straight = evolution(bank, [0]), evolution(bank, [0])
    straight.run(3)
    run.run(1)

    def interrupt(*arguments: object) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(run.objective, "score", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.step()
    monkeypatch.undo()
    run.run(3)
    np.testing.assert_array_equal(run.history[-1].scores, straight.history[-1].scores)


def test_callbacks_and_patience_stop(bank: cl.ModelBank):
    run = evolution(bank, [0])
    seen: list[int] = []
    done = run.run(9, callbacks=[lambda e, g: seen.append(g.index), lambda e, g: g.index == 2])
    assert seen == [0, 1, 2]
    assert len(done) == 3
    flat = evolve.Evolution(lambda images, g: np.zeros((1, 6)), optimiser(1), generator())
    assert len(flat.run(20, patience=4)) == 5
    falling = evolve.Evolution(lambda images, g: np.full((1, 6), -g), optimiser(1, minimise=True), generator())
    assert len(falling.run(12, patience=2)) == 12


def test_checkpoints_are_written_when_said(bank: cl.ModelBank, tmp_path: Path):
    path = tmp_path / "c.ckpt"
    run = evolution(bank, [0])
    present: list[bool] = []
    run.run(5, checkpoint=path, every=3, callbacks=[lambda e, g: present.append(path.exists())])
    assert present == [False, False, False, True, True]
    again = evolution(bank, [0])
    again.load(path)
    assert again.optimiser.generation == 5


def test_module_objectives_score_units_weights_and_readouts(rng: np.random.Generator):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 5, 3), torch.nn.ReLU(), torch.nn.Flatten()).eval()
    images = torch.from_numpy(rng.random((2, 5, 3, 20, 20), dtype=np.float32))
    features = module(images.flatten(0, 1)).detach().unflatten(0, (2, 5))
    n_features = features.shape[2]
    units = evolve.ModuleObjective(module, units=[3, 9], batch=4)
    torch.testing.assert_close(units.score(images, [0, 1]), torch.stack((features[0, :, 3], features[1, :, 9])))
    torch.testing.assert_close(units.score(images[1:], [1]), features[1:, :, 9])
    weights = torch.from_numpy(rng.standard_normal((2, n_features)).astype(np.float32))
    linear = evolve.ModuleObjective(module, weights=weights)
    torch.testing.assert_close(linear.score(images, [0, 1]), torch.einsum("kmf,kf->km", features, weights))
    halved = evolve.ModuleObjective(
        module, readout=lambda f, problems: f.mean(2) + problems[0], problems=2, preprocess=lambda x: x / 2
    )
    expected = module(images[1] / 2).detach().mean(1) + 1
    torch.testing.assert_close(halved.score(images[1:], [1])[0], expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: evolve.ModuleObjective(m), "exactly one of units, weights and readout"),
        (lambda m: evolve.ModuleObjective(m.train(), units=[0]), "training mode"),
        (lambda m: evolve.ModuleObjective(m, units=[]), "units should be a list of positions"),
        (lambda m: evolve.ModuleObjective(m, units=[-1]), "units should be a list of positions"),
        (lambda m: evolve.ModuleObjective(m, units=[0], batch=0), "batch should be at least 1"),
        (lambda m: evolve.ModuleObjective(m, weights=[[np.nan]]), "weights should be finite"),
        (lambda m: evolve.ModuleObjective(m, readout=lambda f, p: f), "problems, the number of problems"),
        (lambda m: evolve.ModuleObjective(m, units=[9]).score(torch.zeros(1, 1, 3, 4, 4), [0]), "unit 9 was asked for"),
        (lambda m: evolve.ModuleObjective(m, weights=[[1.0]]).score(torch.zeros(1, 1, 3, 4, 4), [0]), "1 columns"),
    ],
)
def test_bad_module_objectives_are_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make(torch.nn.Flatten(2).eval() if "unit 9" not in message else torch.nn.AdaptiveAvgPool2d(1).eval())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"neurons": [99]}, ValueError, "neurons should be from 0 to"),
        ({"neurons": []}, TypeError, "neurons should be a list"),
        ({"neurons": [0.5]}, TypeError, "neurons should be a list"),
        ({"neurons": [0], "precision": "half"}, ValueError, "precision should be"),
        ({"neurons": [0], "baseline": [1.0, 2.0]}, ValueError, "baseline should be \\[1\\]"),
    ],
)
def test_bad_bank_objectives_are_refused(
    bank: cl.ModelBank, arguments: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        evolve.BankObjective(bank, **arguments)


def test_the_baseline_is_subtracted(bank: cl.ModelBank, rng: np.random.Generator):
    images = torch.from_numpy(rng.integers(0, 256, (2, 3, *SIZE, 3), dtype=np.uint8))
    plain = evolve.BankObjective(bank, [1, 2]).score(images, [0, 1])
    lowered = evolve.BankObjective(bank, [1, 2], baseline=[0.5, -1.0])
    torch.testing.assert_close(lowered.score(images, [0, 1]), plain - torch.tensor([[0.5], [-1.0]]))
    torch.testing.assert_close(lowered.score(images[1:], [1]), plain[1:] + 1)


def test_parts_that_do_not_fit_are_refused(bank: cl.ModelBank):
    objective = evolve.BankObjective(bank, [0, 1])
    with pytest.raises(ValueError, match="the objective scores 2 problems, the optimiser has 3"):
        evolve.Evolution(objective, optimiser(3), generator())
    with pytest.raises(ValueError, match="takes codes of length 59, the optimiser's have length 60"):
        evolve.Evolution(objective, optimiser(2), evolve.FourierGenerator(*SIZE, dim=59))
    with pytest.raises(ValueError, match="the models take 112 x 112 pixels, images shown have 64 x 64"):
        evolve.Evolution(objective, optimiser(2), evolve.FourierGenerator(64, 64, dim=DIM))
    with pytest.raises(ValueError, match="references should be uint8"):
        evolution(bank, [0], references=np.zeros((1, 5, 5, 3), np.uint8))
    with pytest.raises(ValueError, match="noise and repeats belong to objectives in silico"):
        evolve.Evolution(lambda images, g: 0, optimiser(1), generator(), repeats=2)
    short = evolve.Evolution(lambda images, g: np.zeros((1, 5)), optimiser(1), generator())
    with pytest.raises(ValueError, match=r"should return scores \[1, 6\]"):
        short.step()
    assert short.optimiser.generation == 0
    returned = [np.full((1, 6), np.inf), np.arange(6.0)[None]]
    once = evolve.Evolution(lambda images, g: returned.pop(0), optimiser(1), generator())
    with pytest.raises(ValueError, match="got infinity"):
        once.step()
    assert once.step().index == 0


def test_a_placed_image_is_what_the_models_see(bank: cl.ModelBank):
    placement = evolve.Placement(SIZE, pixels_per_degree=28, size=2, position=(0.5, -0.5))
    run = evolve.Evolution(
        evolve.BankObjective(bank, [0]), optimiser(1), evolve.FourierGenerator(40, 40, dim=DIM), placement=placement
    )
    shown = run.render(run.optimiser.ask()[0, :2])
    assert tuple(shown.shape) == (2, *SIZE, 3)
    top, left, height, width = placement.box
    outside = torch.ones(SIZE, dtype=torch.bool)
    outside[top : top + height, left : left + width] = False
    assert (shown[:, outside] == 128).all()
    assert shown[:, ~outside].float().std() > 5

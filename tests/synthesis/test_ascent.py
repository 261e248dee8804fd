"""Gradient ascent against a plain loop, against the published trajectory, and its promises."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

import cortexloop as cl
from cortexloop.synthesis import adversarial, gaussian_blur, maximize, noise_image
from cortexloop.textbook import procedural_images, textbook_neurons

DATA = Path(os.environ.get("CORTEXLOOP_V4_DATA", Path(__file__).parents[3] / "shared/data/v4_compact"))
MEAN = np.array(cl.IMAGE_MEAN)


@pytest.fixture(scope="module")
def bank() -> cl.ModelBank:
    models = {m.name: m for m in textbook_neurons()}
    return cl.ModelBank.from_weights([models[name] for name in ("edge_45deg", "corner", "dot_large")])


def plain_ascent(bank: cl.ModelBank, x: np.ndarray, steps: int, sign: float, blur_every: int) -> dict[str, np.ndarray]:
    """The published loop for one neuron in float64, as the specification writes it, with scipy's blur."""
    one = np.ones((1, 1))
    trajectory, best, best_image = [], -sign * np.inf, x
    for t in range(steps):
        g = cl.input_gradient(x[None], bank, one)[0]
        g = g / (np.sqrt(np.mean(g**2)) + 1e-5)
        g = gaussian_filter(g, (1.0, 1.0, 0.0))
        x = np.clip(x + sign * 10.0 * g, -MEAN, 255.0 - MEAN)
        r = cl.responses(x[None], bank)[0, 0]
        trajectory.append(r)
        if sign * r > sign * best:
            best, best_image = r, x
        if t % blur_every == 0 and t > 0:
            x = gaussian_filter(x, (1.0, 1.0, 0.0))
    return {"trajectory": np.array(trajectory), "best": best, "image": best_image + MEAN}


@pytest.mark.parametrize(("minimize", "blur_every"), [(False, 3), (True, 50)])
def test_equals_the_published_loop(bank: cl.ModelBank, minimize: bool, blur_every: int):
    start = np.random.default_rng(1).uniform(128, 178, (112, 112, 3)) - MEAN  # float64
    steps = 8
    with cl.use_backend("reference"):
        found = maximize(bank, steps=steps, start=start, minimize=minimize, blur_every=blur_every)
        for n, name in enumerate(bank.names):
            expected = plain_ascent(bank.select([name]), start, steps, -1.0 if minimize else 1.0, blur_every)
            np.testing.assert_allclose(found.trajectory[n], expected["trajectory"], rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(found.responses[n], expected["best"], rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(found.images[n], expected["image"], atol=2e-5)


def test_equals_the_published_trajectory():
    """201025/neuron2 from its published noise image, float64, the 20 steps before rounding is amplified."""
    if not (DATA / "reference_predictions.npz").exists():
        pytest.skip(f"V4 data pack not found at {DATA}; set CORTEXLOOP_V4_DATA")
    bank = cl.ModelBank.load(DATA / "compact_models.npz", names=["201025/neuron2"])
    reference = np.load(DATA / "reference_predictions.npz", allow_pickle=False)
    start = reference["synthesis/initial_raw"] - MEAN
    responses = reference["synthesis/responses"]
    with cl.use_backend("reference"):
        found = maximize(bank, steps=20, start=start, record=(0, 4, 19))
    # A bank folds batch norm and rounds weights to float32 once (relative 6e-8).
    np.testing.assert_allclose(found.initial[0], reference["synthesis/response_initial"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.trajectory[0], responses[:20], rtol=0, atol=1e-5)
    for k, t in enumerate((0, 4, 19)):
        expected = reference[f"synthesis/image_recentered_after_step{t}"]
        relative = np.linalg.norm(found.recorded[k, 0] - MEAN - expected) / np.linalg.norm(expected)
        assert relative < 1e-6
    # In float32 single ReLU gates flip and ascent amplifies that: 2e-5 in ten steps, 2e-2 in twenty.
    single = maximize(bank, steps=10, start=start.astype(np.float32))
    np.testing.assert_allclose(single.trajectory[0], responses[:10], rtol=0, atol=1e-3)


def test_promises_of_the_result(bank: cl.ModelBank):
    seen: list[tuple[int, np.ndarray]] = []
    found = maximize(bank, steps=12, blur_every=5, record=(11, 0), progress=lambda t, r: seen.append((t, r)))
    assert found.names == bank.names
    assert found.images.dtype == np.float32
    assert found.images.shape == (3, 112, 112, 3)
    assert found.images.min() >= 0
    assert found.images.max() <= 255
    np.testing.assert_array_equal(found.responses, found.trajectory.max(axis=1))
    recentred = cl.recenter(found.images)
    np.testing.assert_allclose(cl.responses(recentred, bank, pairs=range(3)), found.responses, rtol=1e-4, atol=1e-4)
    noise = np.repeat(noise_image(bank, 0)[None], 3, axis=0)
    np.testing.assert_allclose(found.initial, cl.responses(noise, bank, pairs=range(3)), rtol=1e-5, atol=1e-5)
    assert [t for t, _ in seen] == list(range(1, 13))
    np.testing.assert_array_equal(np.stack([r for _, r in seen], axis=1), found.trajectory)
    assert found.recorded.shape == (2, 3, 112, 112, 3)
    assert (found.responses > found.initial + 10).all()  # it climbs far
    last = cl.responses(cl.recenter(found.recorded[0]), bank, pairs=range(3))
    np.testing.assert_allclose(last, found.trajectory[:, 11], rtol=1e-4, atol=1e-4)


def test_a_neuron_does_not_depend_on_its_company(bank: cl.ModelBank):
    together = maximize(bank, steps=5)
    alone = maximize(bank.select(["corner"]), steps=5)
    np.testing.assert_array_equal(alone.trajectory[0], together.trajectory[1])
    np.testing.assert_array_equal(alone.images[0], together.images[1])
    again = maximize(bank, steps=5)
    np.testing.assert_array_equal(again.images, together.images)
    other = maximize(bank, steps=5, seed=1)
    assert (other.trajectory != together.trajectory).any()


def test_best_is_found_below_zero_too(bank: cl.ModelBank):
    """The published code starts at a best response of 0: a neuron that stays negative would return the noise."""
    found = maximize(bank, steps=3, step_size=0.01)
    assert (found.responses < 0).all()
    np.testing.assert_array_equal(found.responses, found.trajectory.max(axis=1))
    start = procedural_images(8)[3]
    lowest = maximize(bank, steps=5, minimize=True, start=start, step_size=1.0)
    np.testing.assert_array_equal(lowest.responses, lowest.trajectory.min(axis=1))
    assert (lowest.responses < lowest.initial).all()


def test_grey_images_and_natural_starts(bank: cl.ModelBank):
    found = maximize(bank, steps=4, start=procedural_images(3, seed=2), grey=True)
    np.testing.assert_allclose(found.images, np.repeat(found.images[..., :1], 3, axis=-1), atol=1e-4)
    colour = maximize(bank, steps=4, start=torch.from_numpy(procedural_images(3, seed=2)))
    assert np.ptp(colour.images, axis=-1).max() > 1


def test_blur_equals_scipy():
    images = np.random.default_rng(3).normal(size=(2, 9, 30, 3))
    for sigma in (0.5, 1.0, 2.5, 4.0):  # radius 16 mirrors more than once in 9 rows
        expected = gaussian_filter(images, (0, sigma, sigma, 0))
        np.testing.assert_allclose(gaussian_blur(torch.from_numpy(images), sigma).numpy(), expected, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(gaussian_blur(torch.from_numpy(images), 0.0).numpy(), images)
    with pytest.raises(ValueError, match="negative"):
        gaussian_blur(torch.from_numpy(images), -1.0)


def test_noise_image_is_the_published_one(bank: cl.ModelBank):
    pixels = noise_image(bank, 0) + MEAN
    assert pixels.shape == (112, 112, 3)
    assert pixels.min() >= 127.999
    assert pixels.max() <= 178.001
    assert abs(pixels.mean() - 153) < 0.5
    if (DATA / "reference_predictions.npz").exists():
        reference = np.load(DATA / "reference_predictions.npz", allow_pickle=False)
        np.testing.assert_allclose(pixels, reference["synthesis/initial_raw"], atol=1e-4)


@pytest.mark.parametrize("minimize", [False, True])
def test_adversarial_images_stay_close(bank: cl.ModelBank, minimize: bool):
    base = procedural_images(3, seed=5)
    found = adversarial(bank, base, epsilon=1.0, minimize=minimize, max_steps=60)
    distance = np.abs(found.images - base).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(found.distance, distance, atol=1e-4)
    finished = found.distance >= 1.0
    assert (found.distance < 1.5).all()  # the first step beyond epsilon
    assert finished.any()
    assert (found.steps[~finished] <= 60).all()
    recentred = cl.recenter(found.images)
    np.testing.assert_allclose(cl.responses(recentred, bank, pairs=range(3)), found.responses, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(cl.responses(base, bank, pairs=range(3)), found.base)
    change = found.responses - found.base
    assert ((change < 0) if minimize else (change > 1)).all()


def test_an_image_without_gradient_ends_at_once(bank: cl.ModelBank):
    blank = np.zeros((112, 112, 3), dtype=np.float32)  # no contrast: every filter is silent
    seen: list[int] = []
    found = adversarial(bank.select(["corner"]), blank, progress=lambda t, r: seen.append(t))
    assert found.steps[0] == 1
    assert found.distance[0] == 0
    assert seen == [1]
    np.testing.assert_array_equal(found.responses, found.base)


def test_bad_arguments_are_refused(bank: cl.ModelBank):
    with pytest.raises(ValueError, match="steps should be at least 1"):
        maximize(bank, steps=0)
    with pytest.raises(ValueError, match="recorded steps"):
        maximize(bank, steps=3, record=(3,))
    with pytest.raises(ValueError, match="negative"):
        maximize(bank, blur=-1.0)
    with pytest.raises(ValueError, match=r"\[112, 112, 3\].*got \[2, 112, 112, 3\]"):
        maximize(bank, start=np.zeros((2, 112, 112, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="uint8, float32 or float64"):
        maximize(bank, start=np.zeros((112, 112, 3), dtype=np.int64))
    with pytest.raises(ValueError, match="epsilon"):
        adversarial(bank, procedural_images(3), epsilon=0.0)

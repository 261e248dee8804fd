"""Heatmaps of smoothed patches, and greedy smoothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cortexloop as cl
from cortexloop.attribution import Occlusion, Readout, greedy_smoothing, patches
from cortexloop.features import BankFeatures
from cortexloop.images import gaussian_blur

OPTIONS = {"radius": 2.5, "sigma": 2.0, "stride": 4}


def test_patches_of_the_published_images():
    places = patches(112, 112)
    assert (places.rows, places.columns) == (28, 28)
    assert places.masks.shape == (784, 112, 112)
    assert torch.equal(places.masks[0], places.masks[-1].flip(0, 1))
    inner = places.masks[14 * 28 + 14]
    assert int(inner.sum()) == pytest.approx(np.pi * 10**2, rel=0.03)


def test_squares_tile():
    places = patches(12, 9, radius=1, stride=3, shape="square")
    assert torch.equal(places.masks.sum(0), torch.ones(12, 9, dtype=torch.int64))
    assert torch.equal(places.overlap, torch.eye(12, dtype=torch.bool))


@pytest.mark.parametrize("fill", ["smooth", "zero", 40.0])
def test_heatmaps_are_changes_of_the_response(small_bank, small_images, fill):
    heat = Occlusion(small_bank, fill=fill, **OPTIONS).attribute(small_images)
    places = patches(17, 13, radius=2.5, stride=4)
    assert heat.shape == (4, 3, places.rows, places.columns)
    images = small_images.float()
    filled = {
        "smooth": gaussian_blur(images, 2.0),
        "zero": torch.tensor(small_bank.image_mean).expand_as(images),
        40.0: torch.full_like(images, 40.0),
    }[fill]
    base = cl.responses(small_images, small_bank)
    for p, mask in enumerate(places.masks):
        patched = cl.recenter(torch.where(mask[..., None], filled, images), small_bank.image_mean)
        expected = cl.responses(patched, small_bank) - base
        torch.testing.assert_close(heat.flatten(2)[:, :, p], expected, rtol=1e-4, atol=1e-5)


def test_neurons_pairs_and_memory(small_bank, small_images):
    whole = Occlusion(small_bank, **OPTIONS).attribute(small_images)
    assert torch.equal(Occlusion(small_bank, **OPTIONS).attribute(small_images, neurons=[2, 0]), whole[:, [2, 0]])
    paired = Occlusion(small_bank, memory=3 * 17 * 13 * 3 * 4 * 4, **OPTIONS).attribute(
        small_images, pairs=[0, 1, 2, 0]
    )
    assert torch.equal(paired, whole[range(4), [0, 1, 2, 0]])
    assert Occlusion(small_bank, **OPTIONS).attribute(small_images, neurons=[]).shape == (4, 0, 5, 4)


def test_readouts_of_features(small_bank, small_images):
    source = BankFeatures(small_bank, 0, 1)
    weights = torch.from_numpy(small_bank.models[0].readout).permute(2, 0, 1)[None]
    readout = Readout(source, weights, torch.tensor([small_bank.models[0].readout_bias]))
    heat = Occlusion(readout, **OPTIONS).attribute(small_images)
    torch.testing.assert_close(
        heat, Occlusion(small_bank, **OPTIONS).attribute(small_images, neurons=[0]), rtol=1e-3, atol=1e-4
    )


def test_greedy_smoothing_takes_the_best_patch_each_time(small_bank, small_images):
    pairs = [0, 1, 2, 0]
    result = greedy_smoothing(small_bank, small_images, pairs, count=3, **OPTIONS)
    places = patches(17, 13, radius=2.5, stride=4)
    overlap = places.overlap
    for i, neuron in enumerate(pairs):
        image = small_images[i : i + 1].float()
        smooth = gaussian_blur(image, 2.0)
        chosen = []
        for step in range(len(result.chosen[i])):
            heat = Occlusion(small_bank, fill="smooth", **OPTIONS)
            free = [p for p in range(len(places.masks)) if not any(overlap[p, q] for q in chosen)]
            trials = torch.stack([torch.where(places.masks[p][..., None], smooth[0], image[0]) for p in free])
            values = cl.responses(cl.recenter(trials), small_bank, pairs=[neuron] * len(free))
            best = free[int(values.argmin())]
            assert result.chosen[i][step] == best
            chosen.append(best)
            image = torch.where(places.masks[best][..., None], smooth, image)
            assert result.responses[i][step + 1] == pytest.approx(float(values.min()), rel=1e-4, abs=1e-5)
        assert isinstance(heat, Occlusion)
        torch.testing.assert_close(result.images[i], image[0])


def test_greedy_beats_chance_and_stops_by_itself(small_bank, small_images):
    greedy = greedy_smoothing(small_bank, small_images, [0, 1, 2, 0], **OPTIONS)
    for curve in greedy.responses:
        assert (np.diff(curve) < 0).all()
    counts = max(len(c) for c in greedy.chosen)
    chance = greedy_smoothing(small_bank, small_images, [0, 1, 2, 0], choose="random", count=counts, seed=1, **OPTIONS)
    again = greedy_smoothing(small_bank, small_images, [0, 1, 2, 0], choose="random", count=counts, seed=1, **OPTIONS)
    assert chance.chosen == again.chosen
    fall = [np.mean([c[-1] - c[0] for c in r.responses]) for r in (greedy, chance)]
    assert fall[0] < fall[1]
    raised = greedy_smoothing(small_bank, small_images, [0, 1, 2, 0], choose="highest", count=1, **OPTIONS)
    assert all(c[-1] >= g[1] for c, g in zip(raised.responses, greedy.responses, strict=True))


def test_bad_arguments(small_bank, small_images):
    for options, sentence in (
        ({"fill": "grey"}, "fill should be"),
        ({"sigma": 0}, "sigma should be"),
        ({"radius": 0}, "radius should be"),
        ({"stride": 0}, "stride at least 1"),
        ({"shape": "star"}, "shape should be"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Occlusion(small_bank, **options)
    with pytest.raises(ValueError, match="choose should be"):
        greedy_smoothing(small_bank, small_images, [0] * 4, choose="best")
    with pytest.raises(ValueError, match="one neuron for each"):
        greedy_smoothing(small_bank, small_images, [0])
    with pytest.raises(ValueError, match="covers none"):
        patches(8, 8, radius=0.5, stride=2)

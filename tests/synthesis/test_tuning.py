"""Stimuli have the geometry they promise; tuning curves are the responses to them."""

from __future__ import annotations

import numpy as np
import pytest

import cortexloop as cl
from cortexloop.synthesis import (
    dot_images,
    dot_location_tuning,
    dot_number_tuning,
    dot_size_tuning,
    grating_images,
    orientation_tuning,
    preferred_locations,
)
from cortexloop.textbook import textbook_neurons

MEAN = np.array(cl.IMAGE_MEAN)


@pytest.fixture(scope="module")
def bank() -> cl.ModelBank:
    models = {m.name: m for m in textbook_neurons()}
    return cl.ModelBank.from_weights([models[name] for name in ("edge_0deg", "dot_small", "dot_large")])


def test_dots_have_their_area_centre_and_colour():
    places = np.array([[55.5, 55.5], [40.0, 61.0], [30.3, 70.9]])
    for value in (0.0, 255.0):
        for radius in (0.2, 0.7, 2.0, 5.0, 12.5):
            images = dot_images(places, radius, value=value)
            assert images.dtype == np.float32
            assert images.shape == (3, 112, 112, 3)
            coverage = images / (value - MEAN)
            assert coverage.min() >= 0
            assert coverage.max() <= 1 + 1e-6
            area = coverage[..., 0].sum(axis=(1, 2))
            if radius >= 2:
                np.testing.assert_allclose(area, np.pi * radius**2, rtol=0.1 / radius)
                rows, columns = np.mgrid[:112, :112]
                centre = np.stack([(coverage[..., 0] * g).sum(axis=(1, 2)) / area for g in (rows, columns)], axis=-1)
                np.testing.assert_allclose(centre, places, atol=0.02)
            np.testing.assert_allclose(coverage[..., 0], coverage[..., 2], atol=1e-6)
    assert np.abs(dot_images(places, 0.0)).max() == 0


def test_dots_together_alone_and_absent():
    pair = dot_images([[[30, 30], [80, 80]], [[30, 30], [np.nan, np.nan]], [[-50, 30], [30, 500]]], [4.0, 6.0, 4.0])
    np.testing.assert_array_equal(pair[0], dot_images([[30, 30]], 4.0)[0] + dot_images([[80, 80]], 4.0)[0])
    np.testing.assert_array_equal(pair[1], dot_images([[30, 30]], 6.0)[0])
    assert not pair[2].any()  # outside the image
    overlapping = dot_images([[[30, 30], [31, 30]]], 4.0)
    assert overlapping.max() <= (255 - MEAN).max() + 1e-4
    assert dot_images([[3, 4]], 2.0, height=10, width=7, mean=(100, 110, 120))[0, 3, 4] == pytest.approx(
        [155, 145, 135]
    )


def test_gratings_have_their_angle_wavelength_and_phase():
    horizontal, vertical = grating_images([0, 90], 8.0, 90.0, contrast=0.5)
    assert (np.ptp(horizontal, axis=1) == 0).all()  # rows are uniform
    assert np.ptp(vertical, axis=0).max() < 1e-4
    np.testing.assert_allclose(horizontal[:-8], horizontal[8:], atol=1e-3)
    assert np.abs(horizontal).max() == pytest.approx(50 * np.cos(np.pi / 8))  # the crest lies between two rows
    rising = grating_images(45, 10.0, 0.0)[0]
    np.testing.assert_allclose(rising[1:, :-1], rising[:-1, 1:], atol=1e-3)  # constant along up and to the right
    turned = grating_images([10.0], 7.0, [30.0])
    np.testing.assert_allclose(grating_images([190.0], 7.0, [150.0]), turned, atol=1e-3)
    assert np.abs(grating_images([0, 30, 60], 12.0, 45.0) + 100).min() >= 0  # no channel below black


def test_curves_are_the_responses_to_the_stimuli(bank: cl.ModelBank):
    radii = np.linspace(1, 12, 70)  # more than one batch
    expected = cl.responses(dot_images(np.full((70, 2), 55.5), radii), bank).T
    np.testing.assert_array_equal(dot_size_tuning(bank, radii), expected)
    places = np.array([[50.0, 60.0], [55.5, 55.5], [61.0, 52.0]])
    own = dot_size_tuning(bank, radii, places=places, value=0.0)
    for n in range(3):
        images = dot_images(np.tile(places[n], (70, 1)), radii, value=0.0)
        np.testing.assert_array_equal(own[n], cl.responses(images, bank)[:, n])
        np.testing.assert_array_equal(dot_size_tuning(bank, radii, places=places[n], value=0.0)[n], own[n])

    gratings = grating_images(np.repeat([0, 30], 4), 8.0, np.tile([0, 90, 180, 270], 2))
    mean = cl.responses(gratings, bank).reshape(2, 4, 3).mean(axis=1)
    np.testing.assert_allclose(orientation_tuning(bank, [0, 30]), mean.T, rtol=1e-6)


def test_location_maps_find_the_receptive_field(bank: cl.ModelBank):
    dots = bank.select(["dot_small", "dot_large"])
    maps = dot_location_tuning(dots, stride=8)
    assert maps.shape == (2, 14, 14)
    one = cl.responses(dot_images([[5 * 8 + 3.5, 6 * 8 + 3.5]], 5.0), dots)[0]
    np.testing.assert_array_equal(maps[:, 5, 6], one)
    found = preferred_locations(dots, stride=4)
    assert np.abs(found - 55.5).max() <= 4
    at_edges = np.concatenate([maps[:, 0], maps[:, -1], maps[:, :, 0], maps[:, :, -1]], axis=1)
    assert (maps.max(axis=(1, 2)) > at_edges.max(axis=1) + 5).all()


def test_dot_numbers(bank: cl.ModelBank):
    curves = dot_number_tuning(bank, [0, 1, 5], placements=4, spread=20.0, seed=3)
    assert curves.shape == (3, 3, 4)
    blank = cl.responses(np.zeros((1, 112, 112, 3), dtype=np.float32), bank)[0]
    np.testing.assert_array_equal(curves[:, 0], np.repeat(blank[:, None], 4, axis=1))
    np.testing.assert_array_equal(curves, dot_number_tuning(bank, [0, 1, 5], placements=4, spread=20.0, seed=3))
    assert (curves != dot_number_tuning(bank, [0, 1, 5], placements=4, spread=20.0, seed=4)).any()
    moved = dot_number_tuning(bank, [0, 1, 5], placements=4, spread=20.0, seed=3, places=np.full((3, 2), 55.5))
    np.testing.assert_array_equal(moved, curves)
    crowded = dot_number_tuning(bank, [9], placements=1, spread=4.0)  # no room: dots overlap
    assert np.isfinite(crowded).all()


def test_bad_arguments_are_refused(bank: cl.ModelBank):
    with pytest.raises(ValueError, match="places should be"):
        dot_images([1.0, 2.0, 3.0], 4.0)
    with pytest.raises(ValueError, match="radii should be"):
        dot_images([[1.0, 2.0]], [4.0, 5.0])
    with pytest.raises(ValueError, match="not negative"):
        dot_images([[1.0, 2.0]], -1.0)
    with pytest.raises(ValueError, match="grey level"):
        dot_images([[1.0, 2.0]], 1.0, value=256)
    with pytest.raises(ValueError, match="wavelengths"):
        grating_images([0], 0.0, 0.0)
    with pytest.raises(ValueError, match="radii should be a vector"):
        dot_size_tuning(bank, 3.0)
    with pytest.raises(ValueError, match=r"\[3, 2\].*got \[2, 2\]"):
        dot_size_tuning(bank, [1.0], places=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="stride"):
        dot_location_tuning(bank, stride=0)
    with pytest.raises(ValueError, match="placements"):
        dot_number_tuning(bank, [1], placements=0)
    with pytest.raises(ValueError, match="phases"):
        orientation_tuning(bank, [0], phases=0)

"""Textbook neurons respond to what their names say; procedural images are varied and reproducible."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import cortexloop as cl
from cortexloop.synthesis import dot_images, dot_size_tuning, grating_images, orientation_tuning
from cortexloop.textbook import ARC_RADIUS, DOT_RADIUS, procedural_images, textbook_neurons

CENTRE = 55.5


@pytest.fixture(scope="module")
def bank() -> cl.ModelBank:
    return cl.ModelBank.from_weights(textbook_neurons())


def show(bank: cl.ModelBank, luminance: np.ndarray, names: list[str]) -> np.ndarray:
    """Responses [B, len(names)] to grey images given as luminance around the mean, [B, 112, 112]."""
    images = np.repeat(luminance[..., None], 3, axis=-1).astype(np.float32)
    return cl.responses(images, bank.select(names))


def half_plane(angle: float, offset: float = 0.0, contrast: float = 100.0) -> np.ndarray:
    """An edge whose contour has this angle, `offset` pixels from the image centre."""
    y, x = np.mgrid[:112, :112] - CENTRE
    turn = np.deg2rad(angle)
    return contrast * np.clip(0.5 + offset - x * np.sin(turn) - y * np.cos(turn), 0, 1)


def quadrant(turns: int, contrast: float = 100.0) -> np.ndarray:
    """A square whose top left corner lies in the image centre, turned by quarters."""
    y, x = np.mgrid[:112, :112] - CENTRE
    return np.rot90(contrast * np.clip(0.5 + x, 0, 1) * np.clip(0.5 + y, 0, 1), turns)


def disc_under_centre(radius: float, dy: float, dx: float) -> np.ndarray:
    """A disc whose contour passes through the image centre; its own centre lies in direction (dy, dx) from there."""
    y, x = np.mgrid[:112, :112] - CENTRE
    return 100.0 * np.clip(0.5 + radius - np.hypot(y - radius * dy, x - radius * dx), 0, 1)


def test_they_are_valid_compact_models_with_unique_names():
    models = textbook_neurons()
    assert [m.name for m in models] == [
        "edge_0deg",
        "edge_45deg",
        "edge_90deg",
        "edge_135deg",
        "curve_up",
        "curve_right",
        "corner",
        "dot_small",
        "dot_large",
    ]
    for m in models:
        assert m.validate() is m
        assert [layer.stride for layer in m.layers] == [1, 2, 2, 1, 1]
        assert max(m.filters) <= 16


def test_outputs_are_scaled_on_procedural_images(bank: cl.ModelBank):
    r = cl.responses(procedural_images(500), bank)
    np.testing.assert_allclose(r.mean(axis=0), 0, atol=0.02)
    np.testing.assert_allclose(r.std(axis=0), 1, atol=0.02)


@pytest.mark.parametrize("angle", [0, 45, 90, 135])
def test_edge_neurons_prefer_their_orientation(bank: cl.ModelBank, angle: int):
    name = f"edge_{angle}deg"
    angles = np.arange(0, 180, 15)
    blank = float(show(bank, np.zeros((1, 112, 112)), [name])[0, 0])
    edges = np.stack([half_plane(a, contrast=c) for a in angles for c in (100, -100)])
    curve = show(bank, edges, [name])[:, 0].reshape(len(angles), 2)
    assert (angles[curve.argmax(axis=0)] == angle).all()  # either polarity
    preferred, orthogonal = curve[angles == angle][0], curve[angles == (angle + 90) % 180][0]
    assert (preferred - blank > 20 * np.abs(orthogonal - blank)).all()
    gratings = orientation_tuning(bank.select([name]), angles)[0]
    assert angles[gratings.argmax()] == angle


def test_dot_neurons_prefer_their_radius(bank: cl.ModelBank):
    radii = np.arange(1.0, 25.5, 0.5)
    dots = bank.select(list(DOT_RADIUS))
    for value in (0.0, 255.0):
        curves = dot_size_tuning(dots, radii, value=value)
        for curve, radius in zip(curves, DOT_RADIUS.values(), strict=True):
            best = int(curve.argmax())
            assert abs(radii[best] - radius) <= 1.0
            assert curve[best] > 3 * max(curve[0], curve[-1], 1.0)  # an interior maximum
            # One peak, up to the ripple of a map that is sampled every 4 pixels.
            assert (np.diff(curve[: best + 1]) > -0.05 * curve[best]).all()
            assert (np.diff(curve[best:]) < 0.05 * curve[best]).all()
    straight = np.stack([half_plane(a, d) for a in (0, 30, 45, 90) for d in (-8, -4, 0, 4, 8)])
    assert (show(bank, straight, list(DOT_RADIUS)).max(axis=0) < 0.4 * dot_size_tuning(dots, radii).max(axis=1)).all()


@pytest.mark.parametrize(("name", "towards"), [("curve_up", (1, 0)), ("curve_right", (0, -1))])
def test_curve_neurons_prefer_their_curvature(bank: cl.ModelBank, name: str, towards: tuple[int, int]):
    radii = np.array([3, 5, 7, 9, 11, 13, 16, 20, 30, 60, 1000.0])
    discs = show(bank, np.stack([disc_under_centre(r, *towards) for r in radii]), [name])[:, 0]
    assert abs(radii[discs.argmax()] - ARC_RADIUS) <= 2
    away = (-towards[0], -towards[1])
    opposite = show(bank, np.stack([disc_under_centre(r, *away) for r in radii]), [name])[:, 0]
    straight = np.stack([half_plane(a, d) for a in range(0, 180, 15) for d in range(-16, 17, 4)])
    assert discs.max() > 10 * opposite.max()
    assert discs.max() > 3 * show(bank, straight, [name]).max()


def test_corner_neuron_prefers_its_corner(bank: cl.ModelBank):
    corners = show(bank, np.stack([quadrant(k) for k in range(4)]), ["corner"])[:, 0]
    straight = np.stack([half_plane(a, d) for a in range(0, 180, 15) for d in range(-16, 17, 4)])
    assert corners.argmax() == 0
    assert corners[0] > 10 * corners[1:].max()
    assert corners[0] > 5 * show(bank, straight, ["corner"]).max()


def test_noise_has_a_gradient_for_every_neuron(bank: cl.ModelBank):
    """Otherwise gradient ascent could not start; published models have an RMS of 1.5e-5 to 7e-5 there."""
    noise = np.random.default_rng(0).uniform(128, 178, (1, 112, 112, 3)).astype(np.float32)
    images = np.repeat(noise - np.float32(cl.IMAGE_MEAN), len(bank), axis=0)
    pairs = np.arange(len(bank))
    gradient = cl.input_gradient(images, bank, np.ones(len(bank), dtype=np.float32), pairs=pairs)
    assert (np.sqrt((gradient**2).mean(axis=(1, 2, 3))) > 5e-6).all()


def test_procedural_images_are_varied_and_reproducible():
    images = procedural_images(80)
    assert images.shape == (80, 112, 112, 3)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(procedural_images(35), images[:35])  # image i does not depend on how many there are
    assert (procedural_images(8, seed=1) != images[:8]).any(axis=(1, 2, 3)).all()
    assert len(np.unique(images.reshape(80, -1), axis=0)) == 80
    assert (images.std(axis=(1, 2, 3)) > 5).all()  # none is blank
    assert np.abs(images.mean(axis=(0, 1, 2)) - cl.IMAGE_MEAN).max() < 10
    saturated = ((images == 0) | (images == 255)).mean()
    assert saturated < 0.05
    assert procedural_images(0).shape == (0, 112, 112, 3)
    with pytest.raises(ValueError, match="at least 0"):
        procedural_images(-1)


def test_procedural_images_have_a_natural_spectrum():
    """Power falls with frequency about as f^-2 (natural images: an exponent of 1.5 to 3)."""
    grey = procedural_images(200).mean(axis=-1)
    grey -= grey.mean(axis=(1, 2), keepdims=True)
    power = (np.abs(np.fft.fft2(grey)) ** 2).mean(axis=0)
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(112), np.fft.fftfreq(112)))
    edges = np.geomspace(0.03, 0.4, 8)
    rings = [power[(f >= lo) & (f < hi)].mean() for lo, hi in itertools.pairwise(edges)]
    slope = np.polyfit(np.log(np.sqrt(edges[:-1] * edges[1:])), np.log(rings), 1)[0]
    assert -3.2 < slope < -1.5


def test_stimulus_conventions_agree(bank: cl.ModelBank):
    """A dot at the image centre and a grating of 0 degrees mean the same to the stimuli and to the neurons."""
    dot = dot_images([[CENTRE, CENTRE]], 8.0)
    assert cl.responses(dot, bank)[0].argmax() == bank.names.index("dot_large")
    grating = grating_images([0], 8.0, 90.0)
    np.testing.assert_array_equal(grating[0], np.repeat(grating[0, :, :1], 112, axis=1))  # horizontal stripes

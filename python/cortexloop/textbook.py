"""Textbook neurons built by code as valid compact models, and procedural images to show them.

They need no download and their behaviour is known in advance, so they serve demonstrations and tests. A model is five
layers (5 x 5 kernels, strides 1, 2, 2, 1, 1) and a linear readout, exactly like the published models; batch norm is the
identity (gamma 1, beta 0, mean 0, variance 1 - epsilon), so thresholds are plain negative biases.

- *Edges* (`edge_0deg` .. `edge_135deg`; the angle of the contour, counter-clockwise from horizontal): layer 0 has
  first-derivative-of-Gaussian filters on luminance for the preferred and the orthogonal orientation in both
  polarities; layers 1 and 2 pool along the contour, the orthogonal orientation inhibits.
- *Curves and corners* (`curve_up`: an arc like the top of a disc; `curve_right`: like its right side; `corner`: like
  the top left corner of a square): layer 0 has four orientations in both polarities; layers 1 and 2 form
  min(a, 1) = relu(a) - relu(a - 1), an edge signal that saturates with contrast; layer 3 adds the orientation wanted
  at each place around the centre, subtracts those that a straight contour would add, and a negative bias makes the
  sum a conjunction (AND).
- *Dots* (`dot_small`, `dot_large`; light or dark): luminance travels as an on and an off channel that are blurred layer
  by layer; a narrow minus a wide blur (difference of Gaussians) is largest for a disc of one radius, and a
  negative bias removes the weaker response to straight contours.

The readout is a Gaussian in the image centre: a localised receptive field with some tolerance to position. Besides the
thresholded channel it reads a weak unthresholded one, so that noise, too, has a gradient for ascent to start from.
Outputs are scaled to mean 0 and standard deviation 1 over `procedural_images(500)`.

A leaf: it imports NumPy and `weights.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cortexloop.weights import BATCH_NORM_EPSILON, IMAGE_MEAN, CompactWeights, LayerWeights

Array = NDArray[np.float64]

SIZE = 112
LUMINANCE = np.array([0.299, 0.587, 0.114])
"""Weights of R, G, B in luma (ITU-R BT.601)."""

DOT_RADIUS = {"dot_small": 4.0, "dot_large": 8.0}
"""Radius of the disc, in pixels, that each dot neuron prefers."""

ARC_RADIUS = 11.0
"""Radius in pixels of the arc that the curve neurons prefer."""

_STRIDES = (1, 2, 2, 1, 1)
_TAPS = np.arange(5.0) - 2.0
# Map cell (i, j) of layers 2 to 4 is centred on pixel (4 i + 3, 4 j + 3), so the image centre, 55.5, is cell 13.125.
_MAP_SIZE, _MAP_CENTRE = 28, 13.125
_FULL_CONTRAST = 100.0  # luminance step that counts as 1 in the models
_WEAK = 0.15  # readout weight of unthresholded channels relative to the thresholded one

# Gain and offset of each neuron's output, measured: mean 0, standard deviation 1 over procedural_images(500, seed=0).
_OUTPUT: dict[str, tuple[float, float]] = {
    "edge_0deg": (57.5, 1.14),
    "edge_45deg": (66.3, 1.26),
    "edge_90deg": (79.6, 1.55),
    "edge_135deg": (61.7, 1.16),
    "curve_up": (178.0, 0.66),
    "curve_right": (104.0, 0.44),
    "corner": (106.0, 0.56),
    "dot_small": (169.0, 1.87),
    "dot_large": (315.0, 1.58),
}


def textbook_neurons() -> list[CompactWeights]:
    """Nine model neurons of known selectivity, each a valid compact model for 112 x 112 RGB images.

    Names: edge_0deg, edge_45deg, edge_90deg, edge_135deg, curve_up, curve_right, corner, dot_small, dot_large.
    """
    edges = [_edge_neuron(f"edge_{angle}deg", float(angle)) for angle in (0, 45, 90, 135)]
    return [*edges, *(_contour_neuron(name) for name in _CONTOURS), *(_dot_neuron(name) for name in _DOTS)]


# ---- filters


def _gaussian(
    sigma: float, *, across: float | None = None, angle: float = 0.0, shift: tuple[float, float] = (0.0, 0.0)
) -> Array:
    """A 5 x 5 Gaussian of sum 1, elongated along `angle` if `across` is given; sigmas and shift (y, x) in taps."""
    y, x = np.meshgrid(_TAPS - shift[0], _TAPS - shift[1], indexing="ij")
    along, normal = _rotate(x, y, angle)
    g = np.exp(-0.5 * (along / sigma) ** 2 - 0.5 * (normal / (across or sigma)) ** 2)
    return np.asarray(g / g.sum())


def _edge_filter(angle: float) -> Array:
    """First derivative of a Gaussian: 1 on a full-contrast step along `angle`, lighter above (or left, for 90)."""
    y, x = np.meshgrid(_TAPS, _TAPS, indexing="ij")
    along, normal = _rotate(x, y, angle)
    g = -normal * np.exp(-0.5 * (along / 1.2) ** 2 - 0.5 * (normal / 1.0) ** 2)
    return np.asarray(g / np.maximum(g, 0).sum() / _FULL_CONTRAST)


def _rotate(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    """Coordinates along a contour of this angle (degrees, counter-clockwise; y points down) and across it."""
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    return x * c - y * s, x * s + y * c


def _readout(weights: Sequence[float], sigma: float) -> Array:
    """[28, 28, C]: a Gaussian of sum 1 on the image centre, sigma in cells of 4 pixels, times a weight per channel."""
    axis = np.exp(-0.5 * ((np.arange(_MAP_SIZE) - _MAP_CENTRE) / sigma) ** 2)
    axis /= axis.sum()
    return np.asarray(axis[:, None, None] * axis[:, None] * np.asarray(weights, dtype=np.float64))


# ---- assembly


def _layer(index: int, spatial: Array, pointwise: Array | None, bias: Sequence[float]) -> LayerWeights:
    """Layer with identity batch norm; `spatial` is [5, 5, 3, C] in layer 0 and depthwise [5, 5, C_in] elsewhere."""
    ones = np.ones(len(bias), dtype=np.float32)
    return LayerWeights(
        stride=_STRIDES[index],
        epsilon=BATCH_NORM_EPSILON,
        bias=np.asarray(bias, dtype=np.float32),
        gamma=ones,
        beta=0 * ones,
        mean=0 * ones,
        variance=ones - np.float32(BATCH_NORM_EPSILON),
        kernel=spatial.astype(np.float32) if index == 0 else None,
        depthwise=None if index == 0 else spatial.astype(np.float32),
        pointwise=None if pointwise is None else pointwise.astype(np.float32),
    )


def _luminance_layer(filters: Sequence[Array]) -> LayerWeights:
    """Layer 0: each 5 x 5 filter applied to luminance."""
    kernel = np.stack(filters, -1)[:, :, None, :] * LUMINANCE[:, None]
    return _layer(0, kernel, None, [0.0] * len(filters))


def _separable_layer(
    index: int, depthwise: Sequence[Array], pointwise: Sequence[Sequence[float]], bias: Sequence[float]
) -> LayerWeights:
    """Layers 1 to 4: one 5 x 5 filter per input channel, then `pointwise` as one row of input weights per output."""
    return _layer(index, np.stack(depthwise, -1), np.asarray(pointwise, dtype=np.float64).T, bias)


def _model(name: str, layers: Sequence[LayerWeights], readout: Array) -> CompactWeights:
    gain, offset = _OUTPUT[name]
    return CompactWeights(
        name=name,
        layers=tuple(layers),
        readout=(gain * readout).astype(np.float32),
        readout_bias=-offset,
        height=SIZE,
        width=SIZE,
        image_mean=IMAGE_MEAN,
    ).validate()


# ---- neurons


def _edge_neuron(name: str, angle: float) -> CompactWeights:
    edge, orthogonal = _edge_filter(angle), _edge_filter(angle + 90)
    along, spot = _gaussian(1.5, across=0.7, angle=angle), _gaussian(0.8)
    layers = [
        _luminance_layer([edge, -edge, orthogonal, -orthogonal]),
        # Preferred orientation, each polarity pooled along the contour; orthogonal orientation, both polarities.
        _separable_layer(1, [along, along, spot, spot], [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]], [0.0] * 3),
        _separable_layer(2, [along, along, spot], [[1, 0, -1], [0, 1, -1], [1, 1, 0]], [-0.03, -0.03, 0.0]),
        _separable_layer(3, [along, along, spot], [[1, 0, 0], [0, 1, 0], [0, 0, 1]], [-0.03, -0.03, 0.0]),
        _separable_layer(4, [spot] * 3, np.eye(3).tolist(), [0.0] * 3),
    ]
    return _model(name, layers, _readout([1.0, 1.0, _WEAK], 2.0))


@dataclass(frozen=True)
class _Part:
    """An oriented piece of contour, `row` and `column` in cells of 4 pixels from the centre; weight < 0 inhibits."""

    angle: int
    row: float
    column: float
    weight: float


def _contour_neuron(name: str) -> CompactWeights:
    angles = (0, 45, 90, 135)
    filters = [sign * _edge_filter(angle) for angle in angles for sign in (1, -1)]
    spot, small = _gaussian(0.9), _gaussian(0.6)
    both = np.repeat(np.eye(4), 2, axis=1)  # [orientation, filter]: both polarities of an orientation
    # Layer 0 filters are tuned like a cosine; inhibition by the other orientations narrows that to about 20 degrees.
    sharpen = np.array([[1.0 if i == j else -0.5 if (i - j) % 2 else -0.3 for j in range(4)] for i in range(4)])
    oriented = 12.0 * sharpen @ both  # a step of about a third of full contrast saturates
    parts = _CONTOURS[name]
    place = [
        sum((p.weight * _gaussian(0.6, shift=(p.row, p.column)) for p in parts if p.angle == angle), np.zeros((5, 5)))
        for angle in angles
    ]
    layers = [
        _luminance_layer(filters),
        _separable_layer(1, [spot] * 8, np.vstack([oriented, oriented]).tolist(), [0.0] * 4 + [-1.0] * 4),
        _separable_layer(2, [small] * 8, np.hstack([np.eye(4), -np.eye(4)]).tolist(), [0.0] * 4),
        _separable_layer(3, place, np.ones((3, 4)).tolist(), [0.0, -_THRESHOLD[name] / 2, -_THRESHOLD[name]]),
        _separable_layer(4, [small] * 3, np.eye(3).tolist(), [0.0] * 3),
    ]
    return _model(name, layers, _readout([_WEAK / 4, _WEAK, 1.0], 1.2))


# curve_up runs / - \ over its apex: at 45 degrees from the apex an arc of radius R lies R sin 45 beside and
# R (1 - cos 45) below it, for R = 11 pixels 7.8 and 3.2, about 2 cells and 1.
_CONTOURS: dict[str, tuple[_Part, ...]] = {
    "curve_up": (
        _Part(0, 0, 0, 1.0),
        _Part(45, 0.8, -1.9, 1.0),
        _Part(135, 0.8, 1.9, 1.0),
        _Part(0, 0, -2, -0.7),
        _Part(0, 0, 2, -0.7),
        _Part(45, 0.8, 1.9, -0.7),
        _Part(135, 0.8, -1.9, -0.7),
    ),
    "curve_right": (
        _Part(90, 0, 0, 1.0),
        _Part(135, -1.9, -0.8, 1.0),
        _Part(45, 1.9, -0.8, 1.0),
        _Part(90, -2, 0, -0.7),
        _Part(90, 2, 0, -0.7),
        _Part(135, 1.9, -0.8, -0.7),
        _Part(45, -1.9, -0.8, -0.7),
    ),
    "corner": (
        _Part(0, 0, 1.6, 1.5),
        _Part(90, 1.6, 0, 1.5),
        _Part(0, 0, -1.6, -1.5),
        _Part(90, -1.6, 0, -1.5),
    ),
}
_THRESHOLD = {"curve_up": 0.8, "curve_right": 0.8, "corner": 1.0}


@dataclass(frozen=True)
class _Blurs:
    """Sigmas, in taps, of the blurs of layers 1 to 3 before a difference of Gaussians, and the threshold after it."""

    layer1: float
    layer2: float
    narrow: float
    wide: float
    threshold: float


_DOTS = {
    "dot_small": _Blurs(0.7, 0.6, 0.3, 0.9, 0.3),
    "dot_large": _Blurs(1.5, 1.5, 0.9, 3.0, 0.2),
}


def _dot_neuron(name: str) -> CompactWeights:
    blurs = _DOTS[name]
    spot = _gaussian(0.5) / _FULL_CONTRAST
    blur1, blur2 = _gaussian(blurs.layer1), _gaussian(blurs.layer2)
    narrow, wide = _gaussian(blurs.narrow), _gaussian(blurs.wide)
    # Channels: light, dark; doubled in layer 2, because each channel has a single filter in layer 3.
    double = [[1, 0], [0, 1], [1, 0], [0, 1]]
    light_dot, dark_dot = [1, -1, -1, 1], [-1, 1, 1, -1]
    threshold = -blurs.threshold
    layers = [
        _luminance_layer([spot, -spot]),
        _separable_layer(1, [blur1] * 2, [[1, 0], [0, 1]], [0.0] * 2),
        _separable_layer(2, [blur2] * 2, double, [0.0] * 4),
        _separable_layer(3, [narrow, narrow, wide, wide], [light_dot, dark_dot] * 2, [threshold, threshold, 0.0, 0.0]),
        _separable_layer(4, [_gaussian(0.4)] * 4, [[1, 1, 0, 0], [0, 0, 1, 1]], [0.0] * 2),
    ]
    return _model(name, layers, _readout([1.0, _WEAK], 0.8))


# ---- images

_CHUNK = 32  # images made together: small enough for the cache, large enough for NumPy


def procedural_images(n: int, seed: int = 0) -> NDArray[np.uint8]:
    """Varied colour images made by code: uint8 [n, 112, 112, 3], RGB.

    Every image is 1/f colour noise (the spectrum of natural images) under one of eight kinds of form, in turn: none,
    a grating in a window, an edge, a corner, an arc, dots, an oriented texture, bars. Places, sizes, angles, colours
    and contrasts are random. Image i depends on `seed` and i only, so a longer series begins with the shorter one.

    Raises:
        ValueError: if `n` is negative.
    """
    if n < 0:
        raise ValueError(f"n should be at least 0, got {n}")
    images = np.empty((n, SIZE, SIZE, 3), dtype=np.uint8)
    for start in range(0, n, _CHUNK):
        images[start : start + _CHUNK] = _image_chunk(seed, range(start, min(start + _CHUNK, n)))
    return images


def _image_chunk(seed: int, indices: range) -> NDArray[np.uint8]:
    generators = [np.random.default_rng((seed, i)) for i in indices]
    u = np.stack([g.random(40, dtype=np.float32) for g in generators])  # [B, 40] parameters in [0, 1)
    white = np.stack([g.standard_normal((3, SIZE, SIZE), dtype=np.float32) for g in generators])
    noise = _pink(white)  # [B, 3, H, W]: luminance and two colour directions, standard deviation 1
    form = np.empty((len(indices), SIZE, SIZE), dtype=np.float32)  # 0 = ground colour, 1 = figure colour
    forms = (_clouds, _grating, _edge, _corner, _curve, _dots, _texture, _bars)
    kind = np.arange(indices.start, indices.stop) % len(forms)
    for k, draw in enumerate(forms):
        which = np.flatnonzero(kind == k)
        form[which] = draw(u[which], white[which, 0])
    chroma = np.array([[1.0, -0.5, -0.2], [0.3, 0.3, -1.0]], dtype=np.float32)  # red to green, yellow to blue
    amplitude = 6.0 + 18.0 * u[:, 0] ** 2
    amplitude[kind == 0] += 20.0
    coloured = noise[:, 0, :, :, None] + 0.35 * np.einsum("bchw,cd->bhwd", noise[:, 1:], chroma)
    contrast = np.where(u[:, 1] < 0.5, -1.0, 1.0) * (25.0 + 60.0 * u[:, 2])
    tint = (u[:, None, 3:5] - 0.5) @ chroma * 60.0  # [B, 1, 3], of the ground
    figure = contrast[:, None, None] + (u[:, None, 5:7] - 0.5) @ chroma * 80.0
    mean = np.array(IMAGE_MEAN, dtype=np.float32) + (u[:, 7, None] - 0.5) * 40.0
    pixels = (mean[:, None, :] + tint)[:, None] + (form - 0.5)[..., None] * figure[:, None]
    pixels += amplitude[:, None, None, None] * coloured
    return np.asarray(np.clip(np.rint(pixels), 0, 255), dtype=np.uint8)


Single = NDArray[np.float32]


def _pink(white: Single) -> Single:
    """Filter white noise [..., H, W] to an amplitude spectrum of 1/f, mean 0, standard deviation 1."""
    fy, fx = np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None, :]
    f = np.hypot(fy, fx)
    spectrum = np.fft.rfft2(white) * np.where(f > 0, 1 / np.maximum(f, 1 / SIZE), 0)
    pink = np.fft.irfft2(spectrum, s=(SIZE, SIZE)).astype(np.float32)
    return np.asarray(pink / pink.std(axis=(-2, -1), keepdims=True))


def _axes(u: Single, spread: float) -> tuple[Single, Single]:
    """Pixel coordinates (x, y), each [B, H, W], around a random centre within `spread` pixels of the image centre."""
    grid = np.arange(SIZE, dtype=np.float32) - np.float32((SIZE - 1) / 2)
    centre = (2 * u[:, 8:10] - 1) * np.float32(spread)
    shape = (len(u), SIZE, SIZE)
    x = np.broadcast_to(grid[None, None, :] - centre[:, 0, None, None], shape)
    return x, np.broadcast_to(grid[None, :, None] - centre[:, 1, None, None], shape)


def _turned(u: Single, x: Single, y: Single) -> tuple[Single, Single]:
    """The coordinates turned by a random angle; a quarter of the images keep to multiples of 45 degrees."""
    angle = 2 * np.pi * np.where(u[:, 11] < 0.25, np.floor(8 * u[:, 10]) / 8, u[:, 10])[:, None, None]
    c, s = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return x * c - y * s, x * s + y * c


def _clouds(u: Single, white: Single) -> Single:
    return np.full((len(u), SIZE, SIZE), 0.5, dtype=np.float32)


def _grating(u: Single, white: Single) -> Single:
    x, y = _axes(u, 20)
    along, across = _turned(u, x, y)
    period = (4.0 * 10 ** u[:, 12])[:, None, None]  # 4 to 40 pixels
    window = np.exp(-(along**2 + across**2) / (2 * (12 + 40 * u[:, 13]) ** 2)[:, None, None])
    return np.asarray(0.5 + 0.5 * window * np.sin(2 * np.pi * (across / period + u[:, 14, None, None])))


def _edge(u: Single, white: Single) -> Single:
    _, across = _turned(u, *_axes(u, 15))
    blur = (0.5 + 4 * u[:, 12] ** 2)[:, None, None]
    return np.asarray(np.clip(0.5 + across / (2 * blur), 0, 1))


def _corner(u: Single, white: Single) -> Single:
    a, b = _turned(u, *_axes(u, 8))
    opening = (np.pi * (0.25 + 0.5 * u[:, 12]))[:, None, None]  # 45 to 135 degrees
    opening = np.where(u[:, 13, None, None] < 0.5, np.pi / 2, opening)
    other = a * np.sin(opening) - b * np.cos(opening)
    return np.asarray(np.clip(0.5 + b, 0, 1) * np.clip(0.5 + other, 0, 1))


def _curve(u: Single, white: Single) -> Single:
    x, y = _axes(u, 8)
    radius = (5.0 * 10 ** u[:, 12])[:, None, None]  # 5 to 50 pixels, the contour through the random centre
    angle = 2 * np.pi * np.where(u[:, 11] < 0.4, np.floor(8 * u[:, 10]) / 8, u[:, 10])[:, None, None]
    distance = np.hypot(x - radius * np.cos(angle), y - radius * np.sin(angle)) - radius
    ring = u[:, 13, None, None] < 0.4  # a line instead of a filled disc
    return np.asarray(np.clip(np.where(ring, 2.0 - np.abs(distance), 0.5 - distance), 0, 1))


def _dots(u: Single, white: Single) -> Single:
    x, y = _axes(u, 4)
    radius = 1.5 * 10 ** u[:, 12]  # 1.5 to 15 pixels
    form = np.clip(0.5 + radius[:, None, None] - np.hypot(x, y), 0, 1)  # one dot near the centre, others around
    for k in range(6):
        dx, dy = (100 * (u[:, 20 + 3 * k + j, None, None] - 0.5) for j in range(2))
        size = radius * (0.5 + u[:, 22 + 3 * k])
        dot = np.clip(0.5 + size[:, None, None] - np.hypot(x - dx, y - dy), 0, 1)
        form = np.where(u[:, 13, None, None] * 6 > k, np.maximum(form, dot), form)
    return np.asarray(form)


def _texture(u: Single, white: Single) -> Single:
    """Noise of one orientation and scale, half of the images reduced to two levels."""
    fy, fx = np.meshgrid(np.fft.fftfreq(SIZE), np.fft.rfftfreq(SIZE), indexing="ij")
    angle, centre = np.pi * u[:, 10, None, None], (0.04 * 5 ** u[:, 12])[:, None, None]
    f = np.hypot(fx, fy)
    turn = np.cos(np.arctan2(fy, fx) - angle) ** 2
    band = np.exp(-0.5 * (np.log2(np.maximum(f, 1e-6) / centre) / 0.5) ** 2 - (1 - turn) * (8 * u[:, 13, None, None]))
    pattern = np.fft.irfft2(np.fft.rfft2(white) * band, s=(SIZE, SIZE))
    pattern /= pattern.std(axis=(-2, -1), keepdims=True)
    gain = np.where(u[:, 14] < 0.5, 4.0, 0.35)[:, None, None]
    return np.asarray(np.clip(0.5 + gain * pattern, 0, 1), dtype=np.float32)


def _bars(u: Single, white: Single) -> Single:
    along, across = _turned(u, *_axes(u, 12))
    width, length = (1.0 + 6 * u[:, 12])[:, None, None], (8 + 60 * u[:, 13])[:, None, None]
    bar = np.clip(0.5 + width - np.abs(across), 0, 1) * np.clip(0.5 + length - np.abs(along), 0, 1)
    crossing = np.clip(0.5 + width - np.abs(along), 0, 1) * np.clip(0.5 + length - np.abs(across), 0, 1)
    return np.asarray(np.where(u[:, 14, None, None] < 0.35, np.maximum(bar, crossing), bar))

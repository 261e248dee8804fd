"""Simple stimuli, and how a bank's responses vary with one property of them.

Images are recentred float32 [B, H, W, 3] on a background of 0, the mean colour of natural images. Places are (row,
column) in pixels from the top left pixel's centre, so that the image centre is ((H - 1) / 2, (W - 1) / 2). Angles are
those of a contour, in degrees counter-clockwise from horizontal: 0 is horizontal, 90 vertical.

Source of the dot stimuli: Cowley et al.; background, value and antialiasing are choices made here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cortexloop.bank import ModelBank
from cortexloop.functional import responses
from cortexloop.weights import IMAGE_MEAN

Images = NDArray[np.float32]

_BATCH = 64  # images made and shown at a time: 10 MB


def dot_images(
    places: ArrayLike,
    radii: ArrayLike,
    *,
    value: float = 255.0,
    height: int = 112,
    width: int = 112,
    mean: Sequence[float] = IMAGE_MEAN,
) -> Images:
    """Antialiased discs on a uniform background.

    Args:
        places: [B, 2] (row, column), or [B, K, 2] for K dots per image; NaN = no dot. They may lie outside the image.
        radii: in pixels, a number or [B].
        value: grey level of the dots, 0..255 (0 and 255 in the paper's stimuli).
        height, width: of the images.
        mean: RGB mean that recentring subtracts.

    Returns:
        Recentred float32 [B, H, W, 3]. Coverage falls linearly over one pixel across the rim; where dots overlap the
        larger coverage counts.

    Raises:
        ValueError: wrong shape, negative radius, or a value outside 0..255.
    """
    centre = np.asarray(places, dtype=np.float64)
    if centre.ndim not in (2, 3) or centre.shape[-1] != 2:
        raise ValueError(f"places should be [B, 2] or [B, K, 2], got {list(centre.shape)}")
    centre = centre.reshape(len(centre), -1, 2)
    radius = np.asarray(radii, dtype=np.float64)
    if radius.shape not in ((), (len(centre),)) or not np.all(radius >= 0):
        raise ValueError(
            f"radii should be one number or one per image, [{len(centre)}], and not negative, got {radii!r}"
        )
    if not 0 <= value <= 255:
        raise ValueError(f"value should be a grey level, 0..255, got {value}")
    rim = np.broadcast_to(radius, len(centre))[:, None, None] + 0.5
    rows, columns = np.arange(height)[:, None], np.arange(width)
    coverage = np.zeros((len(centre), height, width))
    for k in range(centre.shape[1]):
        row, column = centre[:, k, 0, None, None], centre[:, k, 1, None, None]
        # A disc smaller than a pixel covers only its area of it.
        disc = np.clip(rim - np.hypot(rows - row, columns - column), 0.0, np.minimum(1.0, np.pi * (rim - 0.5) ** 2))
        coverage = np.fmax(coverage, disc)  # fmax: a NaN is no dot
    colour = value - np.asarray(mean, dtype=np.float64)
    return (coverage[..., None] * colour).astype(np.float32)


def grating_images(
    angles: ArrayLike,
    wavelengths: ArrayLike,
    phases: ArrayLike,
    *,
    contrast: float = 0.9,
    height: int = 112,
    width: int = 112,
) -> Images:
    """Grey sine gratings over the whole image.

    Args:
        angles: [B] or a number, degrees, the direction of the stripes.
        wavelengths: [B] or a number, pixels per cycle, above 0.
        phases: [B] or a number, degrees, at the image centre; 0 is a zero crossing.
        contrast: amplitude as a fraction of the 100 grey levels that fit below the channel means, 0..1.
        height, width: of the images.

    Returns:
        Recentred float32 [B, H, W, 3].

    Raises:
        ValueError: if shapes differ, a wavelength is not positive or the contrast is outside 0..1.
    """
    angle, wavelength, phase = (np.atleast_1d(np.asarray(a, dtype=np.float64)) for a in (angles, wavelengths, phases))
    angle, wavelength, phase = np.broadcast_arrays(angle, wavelength, phase)
    if angle.ndim != 1 or not np.all(wavelength > 0) or not 0 <= contrast <= 1:
        raise ValueError(
            f"angles, wavelengths (above 0) and phases should be numbers or vectors and contrast 0..1, "
            f"got shape {angle.shape}, wavelengths {wavelengths!r}, contrast {contrast}"
        )
    y, x = (np.arange(size) - (size - 1) / 2 for size in (height, width))
    turn = np.deg2rad(angle)[:, None, None]
    across = x * np.sin(turn) + y[:, None] * np.cos(turn)
    wave = np.sin(2 * np.pi * across / wavelength[:, None, None] + np.deg2rad(phase)[:, None, None])
    return np.repeat((100.0 * contrast * wave)[..., None], 3, axis=-1).astype(np.float32)


def dot_size_tuning(
    bank: ModelBank,
    radii: ArrayLike,
    *,
    places: ArrayLike | None = None,
    value: float = 255.0,
    backend: str = "auto",
) -> NDArray[np.float32]:
    """Responses to one dot as a function of its radius.

    Args:
        bank: N models.
        radii: [R] in pixels.
        places: where to show it: None for the image centre, [2] for one place, or [N, 2] for a place per neuron (see
            `preferred_locations`).
        value: grey level of the dot.
        backend: see `responses`.

    Returns:
        [N, R].

    Raises:
        ValueError: wrong shapes or values, see `dot_images`.
    """
    radius = np.asarray(radii, dtype=np.float64)
    if radius.ndim != 1:
        raise ValueError(f"radii should be a vector, got shape {list(radius.shape)}")
    place, shared = _places(bank, places)
    shown = np.repeat(place, len(radius), axis=0)[:, None]
    found = _dot_responses(bank, shown, np.tile(radius, len(place)), value, shared, backend)
    return found.reshape(len(bank), len(radius))


def dot_location_tuning(
    bank: ModelBank, *, radius: float = 5.0, value: float = 255.0, stride: int = 4, backend: str = "auto"
) -> NDArray[np.float32]:
    """Responses to one dot as a function of its place: a map per neuron.

    Args:
        bank: N models.
        radius: in pixels, 5 in the paper.
        value: grey level of the dot.
        stride: distance between places in pixels (1 = every pixel; 4 gives 28 x 28 places, as shown in vivo).
        backend: see `responses`.

    Returns:
        [N, ceil(H / stride), ceil(W / stride)]; the dot of entry (i, j) is centred at row
        i stride + (stride - 1) / 2 and column j stride + (stride - 1) / 2.

    Raises:
        ValueError: if `stride` is less than 1, or see `dot_images`.
    """
    if stride < 1:
        raise ValueError(f"stride should be at least 1, got {stride}")
    rows, columns = (np.arange(0, size, stride) + (stride - 1) / 2 for size in (bank.height, bank.width))
    places = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 1, 2)
    found = _dot_responses(bank, places, np.full(len(places), radius), value, True, backend)
    return found.reshape(len(bank), len(rows), len(columns))


def preferred_locations(
    bank: ModelBank, *, radius: float = 5.0, value: float = 255.0, stride: int = 4, backend: str = "auto"
) -> NDArray[np.float64]:
    """Where a dot excites each neuron most: [N, 2] (row, column). Arguments as `dot_location_tuning`."""
    maps = dot_location_tuning(bank, radius=radius, value=value, stride=stride, backend=backend)
    best = maps.reshape(len(bank), -1).argmax(axis=1)
    return np.stack(np.unravel_index(best, maps.shape[1:]), -1) * float(stride) + (stride - 1) / 2


def dot_number_tuning(
    bank: ModelBank,
    numbers: Sequence[int],
    *,
    places: ArrayLike | None = None,
    radius: float = 5.0,
    value: float = 255.0,
    spread: float = 25.0,
    placements: int = 10,
    seed: int = 0,
    backend: str = "auto",
) -> NDArray[np.float32]:
    """Responses to several dots near a place as a function of their number.

    The dots are uniform in a disc of radius `spread` around the place and do not overlap as long as there is room. All
    neurons see the same placements, moved to their place.

    Args:
        bank: N models.
        numbers: how many dots, each at least 0.
        places: as for `dot_size_tuning`.
        radius, value: of the dots; 5 pixels in the paper.
        spread: in pixels (not given in the paper).
        placements: random placements per number, 10 in the paper.
        seed: of the placements.
        backend: see `responses`.

    Returns:
        [N, numbers, placements]; the tuning curve is its mean over the last axis.

    Raises:
        ValueError: wrong shapes or values.
    """
    if placements < 1 or any(k < 0 for k in numbers):
        raise ValueError(f"placements should be at least 1 and numbers not negative, got {placements}, {list(numbers)}")
    rng = np.random.default_rng(seed)
    offsets = np.full((len(numbers), placements, max([*numbers, 1]), 2), np.nan)
    for i, number in enumerate(numbers):
        for j in range(placements):
            offsets[i, j, :number] = _scattered(rng, number, spread, 2 * radius)
    place, shared = _places(bank, places)
    shown = (place[:, None, None, None] + offsets).reshape(-1, *offsets.shape[2:])
    found = _dot_responses(bank, shown, np.full(len(shown), radius), value, shared, backend)
    return found.reshape(len(bank), len(numbers), placements)


def orientation_tuning(
    bank: ModelBank,
    angles: ArrayLike,
    *,
    wavelength: float = 8.0,
    contrast: float = 0.9,
    phases: int = 4,
    backend: str = "auto",
) -> NDArray[np.float32]:
    """Responses to gratings as a function of the angle of their stripes, averaged over phases.

    Args:
        bank: N models.
        angles: [A] degrees.
        wavelength, contrast: see `grating_images`.
        phases: number of equally spaced phases.
        backend: see `responses`.

    Returns:
        [N, A].

    Raises:
        ValueError: if `phases` is less than 1, or see `grating_images`.
    """
    if phases < 1:
        raise ValueError(f"phases should be at least 1, got {phases}")
    angle = np.repeat(np.asarray(angles, dtype=np.float64).ravel(), phases)
    phase = np.tile(np.arange(phases) * 360.0 / phases, len(angle) // phases)
    found = np.empty((len(angle), len(bank)), dtype=np.float32)
    for part in _batches(len(angle)):
        images = grating_images(
            angle[part], wavelength, phase[part], contrast=contrast, height=bank.height, width=bank.width
        )
        found[part] = responses(images, bank, backend=backend)
    return np.asarray(found.T.reshape(len(bank), -1, phases).mean(axis=-1))


def _places(bank: ModelBank, places: ArrayLike | None) -> tuple[NDArray[np.float64], bool]:
    """Places [1 or N, 2] and whether one place serves all neurons."""
    if places is None:
        return np.array([[(bank.height - 1) / 2, (bank.width - 1) / 2]]), True
    place = np.asarray(places, dtype=np.float64)
    if place.shape not in ((2,), (len(bank), 2)):
        raise ValueError(f"places should be [2] or [{len(bank)}, 2] (row, column), got {list(place.shape)}")
    return place.reshape(-1, 2), place.ndim == 1


def _dot_responses(
    bank: ModelBank, places: NDArray[np.float64], radii: NDArray[np.float64], value: float, shared: bool, backend: str
) -> NDArray[np.float32]:
    """Responses [N, M] to dots at places [M, K, 2] shown to all, or [N * M, K, 2], M for each neuron in turn."""
    total = len(places)
    pairs = None if shared else np.repeat(np.arange(len(bank)), total // len(bank))
    found = np.empty((total, len(bank)) if shared else (total,), dtype=np.float32)
    for part in _batches(total):
        images = dot_images(
            places[part], radii[part], value=value, height=bank.height, width=bank.width, mean=bank.image_mean
        )
        found[part] = responses(images, bank, pairs=None if pairs is None else pairs[part], backend=backend)
    return found.T if shared else found.reshape(len(bank), -1)


def _batches(total: int) -> Iterator[slice]:
    return (slice(start, min(start + _BATCH, total)) for start in range(0, total, _BATCH))


def _scattered(rng: np.random.Generator, number: int, spread: float, apart: float) -> NDArray[np.float64]:
    """`number` points [number, 2] in a disc; each new one the first of 200 candidates that keeps its distance."""
    points = np.empty((0, 2))
    for _ in range(number):
        angle = 2 * np.pi * rng.random(200)
        candidates = spread * np.sqrt(rng.random(200))[:, None] * np.stack([np.sin(angle), np.cos(angle)], -1)
        gap = np.linalg.norm(candidates[:, None] - points, axis=-1).min(axis=1, initial=np.inf)
        free = np.flatnonzero(gap >= apart)
        points = np.vstack([points, candidates[free[0] if len(free) else gap.argmax()]])
    return points

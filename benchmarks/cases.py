"""What is measured: models, images and the operations of one evaluation. Imports cortexloop's leaves and NumPy only."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cortexloop.weights import BATCH_NORM_EPSILON, IMAGE_MEAN, CompactWeights, LayerWeights, same_padding

MEDIAN_FILTERS = (47, 57, 3, 7, 3)
"""Median filter counts of the 219 published models."""

STRIDES = (1, 2, 2, 1, 1)
KERNEL = 5

# minimum, quartiles and maximum of the published filter counts, one row per layer
FILTER_QUANTILES = (
    (15, 44, 47, 49, 58),
    (3, 45.5, 57, 63.5, 77),
    (3, 3, 3, 5, 74),
    (3, 5, 7, 9, 46),
    (3, 3, 3, 4, 11),
)


@dataclass(frozen=True)
class Case:
    """Models and images that a contender has to evaluate.

    Attributes:
        name: goes into the recorded row, without the batch size.
        models: raw parameters.
        images: uint8 [B, H, W, 3], RGB.
    """

    name: str
    models: tuple[CompactWeights, ...]
    images: NDArray[np.uint8]

    @property
    def batch(self) -> int:
        return len(self.images)

    @property
    def evaluations(self) -> int:
        """Number of (image, model) pairs."""
        return self.batch * len(self.models)

    @property
    def flop(self) -> float:
        """Floating-point operations of one forward pass as direct convolutions (a multiply-add counts two)."""
        return 2.0 * self.batch * sum(multiply_adds(m) for m in self.models)

    def with_batch(self, batch: int) -> Case:
        """The same models on the first `batch` images, repeated if there are fewer."""
        return Case(self.name, self.models, np.resize(self.images, (batch, *self.images.shape[1:])))

    def recentred(self) -> NDArray[np.float32]:
        """float32 [B, H, W, 3]: the form that peers take."""
        return (self.images.astype(np.float64) - self.models[0].image_mean).astype(np.float32)


def multiply_adds(model: CompactWeights) -> int:
    """Multiply-adds of one model on one image, direct convolutions plus readout."""
    total = model.readout.size
    for layer, (h, w) in zip(model.layers, model.map_sizes(), strict=True):
        taps, c, o = layer.kernel_size**2, layer.in_channels, layer.out_channels
        total += h * w * (taps * c * o if layer.kernel is not None else c * (taps + o))
    return int(total)


def random_images(count: int, rng: np.random.Generator, size: int = 112) -> NDArray[np.uint8]:
    """uint8 [count, size, size, 3] with an amplitude spectrum of about 1 / frequency, as natural images have."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((count, 3, size, size))) / frequency
    spectrum[:, 1:] = 0.8 * spectrum[:, :1] + 0.6 * spectrum[:, 1:]  # channels of a photograph are correlated
    fields = np.fft.irfft2(spectrum, s=(size, size))
    fields *= 50 / fields.std(axis=(2, 3), keepdims=True)
    pixels = fields + np.asarray(IMAGE_MEAN)[:, None, None]
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1).copy()


def random_model(name: str, filters: Sequence[int], rng: np.random.Generator, size: int = 112) -> CompactWeights:
    """A model of the published form with random weights; batch norm brings every map to unit scale, as training does.

    The variances follow from the weights and a rough model of the input (independent taps, half of a rectified map
    active), which keeps responses of order one without a calibration pass.
    """

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    layers = []
    channels, height = 3, size
    second_moment = 50.0**2
    for index, (out, stride) in enumerate(zip(filters, STRIDES, strict=True)):
        if index == 0:
            kernel = normal(KERNEL, KERNEL, 3, out)
            kernel -= kernel.mean(axis=(0, 1, 2))
            spatial = {"kernel": kernel}
            variance = second_moment * np.square(kernel).sum(axis=(0, 1, 2))
        else:
            depthwise, pointwise = normal(KERNEL, KERNEL, channels) / KERNEL, normal(channels, out) / channels**0.5
            spatial = {"depthwise": depthwise, "pointwise": pointwise}
            variance = second_moment * np.square(depthwise).sum(axis=(0, 1)) @ np.square(pointwise)
        layers.append(
            LayerWeights(
                stride=stride,
                epsilon=BATCH_NORM_EPSILON,
                bias=normal(out) * 0.1,
                gamma=(1 + 0.2 * rng.random(out)).astype(np.float32),
                beta=normal(out) * 0.3 + np.float32(0.3),
                mean=normal(out) * 0.1,
                variance=variance.astype(np.float32),
                **spatial,
            )
        )
        channels, height = out, same_padding(height, KERNEL, stride)[0]
        second_moment = 1.0
    readout = normal(height, height, channels) / np.float32((height * height * channels) ** 0.5)
    return CompactWeights(name, tuple(layers), readout, 0.0, height=size, width=size).validate()


def random_filters(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """[count, 5] filter counts, drawn from the quartiles of the published models (log-linear in between)."""
    quantiles = np.log(np.asarray(FILTER_QUANTILES))
    draws = rng.random((count, 5))
    logs = np.stack([np.interp(draws[:, i], np.linspace(0, 1, 5), quantiles[i]) for i in range(5)], axis=1)
    return np.rint(np.exp(logs)).astype(np.int64)


def random_bank(count: int, rng: np.random.Generator) -> tuple[CompactWeights, ...]:
    """Models with the published distribution of filter counts."""
    return tuple(random_model(f"random{i}", filters, rng) for i, filters in enumerate(random_filters(count, rng)))


def data_pack() -> Path | None:
    """Folder of the published V4 models, if it is at hand."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "v4_compact"
    folder = Path(os.environ.get("CORTEXLOOP_V4_DATA", beside))
    return folder if (folder / "compact_models.npz").is_file() else None


def one_model(seed: int = 0) -> Case:
    """One model of median work: the published one where the data pack is at hand, else one of the median shape."""
    bank = all_models(seed)
    if bank.name.startswith("random"):
        rng = np.random.default_rng(seed)
        return Case("random model", (random_model("median", MEDIAN_FILTERS, rng),), bank.images)
    # nearest to the median shape, so that figures of different machines and packs can be compared
    distance = [np.abs(np.log(np.asarray(m.filters) / MEDIAN_FILTERS)).sum() for m in bank.models]
    return Case("published model", (bank.models[int(np.argmin(distance))],), bank.images)


def all_models(seed: int = 0) -> Case:
    """All published models at hand on the reference images, else 219 random ones on random images."""
    folder = data_pack()
    if folder is None:
        rng = np.random.default_rng(seed)
        models = random_bank(219, rng)
        return Case(f"random bank of {len(models)}", models, random_images(48, rng))
    from cortexloop import io

    models = tuple(io.load_models(folder / "compact_models.npz"))
    with np.load(folder / "reference_predictions.npz") as references:
        images = references["images_uint8"]
    return Case(f"published bank of {len(models)}", models, images)

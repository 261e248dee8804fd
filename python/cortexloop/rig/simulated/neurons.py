"""Simulated neurons: a bank of models as Poisson neurons with latency, adaptation and spontaneous activity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cortexloop.bank import ModelBank
from cortexloop.functional import responses
from cortexloop.realtime.source import Images
from cortexloop.textbook import textbook_neurons as textbook_models

Spikes = list[NDArray[np.int64]]
"""For each neuron: times of its spikes, nanoseconds."""


class Neurons:
    """Spikes of a bank's models. Independent Poisson processes: no refractory period, no shared noise.

    The rate evoked by an image is `gain_hz` times the rectified response of the model (in its standard deviations, from
    one below the mean), no more than `max_hz`. It begins `latency_ns` after light, decays from a transient to half of
    it with `decay_ms`, and ends as long after the light. Neurons that fired much before respond less (`adaptation`),
    and recover with a time constant of half a second.

    Args:
        bank: the models; their names are the units'.
        seed: of the latencies.
        names: what the first units are called instead.

    Raises:
        ValueError: more names than models, or one twice.
    """

    baseline_hz = 4.0
    gain_hz = 25.0
    max_hz = 250.0
    decay_ms = 60.0
    sustained = 0.5
    adaptation = 0.2
    recovery_s = 0.5

    def __init__(self, bank: ModelBank, seed: int = 0, names: Sequence[str] = ()) -> None:
        if len(names) > len(bank):
            raise ValueError(
                f"there are {len(bank)} simulated neurons, too few for the {len(names)} units {list(names)}"
            )
        self.bank = bank
        self.units = [*names, *bank.names[len(names) :]]
        if len(set(self.units)) != len(self.units):
            raise ValueError(f"units should have different names, got {self.units}")
        rng = np.random.default_rng([seed, 2])
        self.latency_ns = rng.uniform(45e6, 65e6, len(self.units)).astype(np.int64)
        self.gain = 1.0
        """Of all neurons; changes slowly over a day."""
        self._fatigue = np.zeros(len(self.units))
        self._last_ns = 0

    def drive(self, images: Images) -> NDArray[np.float64]:
        """Evoked rates without adaptation, spikes per second [images, units], of uint8 images [n, H, W, 3]."""
        found = np.asarray(responses(images, self.bank), np.float64)
        return np.minimum(self.gain_hz * np.maximum(found + 1.0, 0.0), self.max_hz)

    def evoke(self, drive: NDArray[np.float64], on_ns: int, off_ns: int, rng: np.random.Generator) -> Spikes:
        """Spikes in answer to one image, whose light is on from `on_ns` to `off_ns`; images in order of time."""
        recovered = np.exp(-max(on_ns - self._last_ns, 0) / 1e9 / self.recovery_s)
        self._fatigue *= recovered
        rate = self.gain * drive * (1 - self.adaptation * self._fatigue)
        self._fatigue = np.minimum(self._fatigue + 0.5 * drive / self.max_hz, 1.0)
        self._last_ns = on_ns
        steps = np.arange(0.5, max((off_ns - on_ns) / 1e6, 1.0))  # ms
        course = self.sustained + (1 - self.sustained) * np.exp(-steps / self.decay_ms)
        cumulative = np.concatenate([[0.0], np.cumsum(course)])
        counts = rng.poisson(rate * cumulative[-1] / 1e3)
        found = []
        for latency, count in zip(self.latency_ns.tolist(), counts.tolist(), strict=True):
            at_ms = np.interp(rng.random(count) * cumulative[-1], cumulative, np.arange(len(cumulative)))
            found.append(on_ns + latency + (at_ms * 1e6).astype(np.int64))
        return found

    def idle(self, from_ns: int, to_ns: int, rng: np.random.Generator) -> Spikes:
        """Spontaneous spikes."""
        counts = rng.poisson(self.baseline_hz * (to_ns - from_ns) / 1e9, len(self.units))
        return [rng.integers(from_ns, max(to_ns, from_ns + 1), count) for count in counts.tolist()]


def textbook_neurons(seed: int = 0, names: Sequence[str] = ()) -> Neurons:
    """The nine textbook neurons."""
    return Neurons(ModelBank(textbook_models()), seed, names)

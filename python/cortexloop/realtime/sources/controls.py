"""`ControlSource`: preferred images of a factorized model and of its control models, as conditions of an experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cortexloop.factor import (
    Control,
    FactorModel,
    Factors,
    channel_permutation,
    keep_only,
    mask_transplant,
    optimal_images,
    patch_shuffle,
    remove,
    sign_flip,
    target,
)
from cortexloop.factor.images import image_size
from cortexloop.realtime.refit import Double
from cortexloop.realtime.source import Images, Proposal, sha256
from cortexloop.realtime.sources import common

CONDITIONS = ("optimal", "channel_permutation", "patch_shuffle", "sign_flip")

_RANDOM = {
    "channel_permutation": channel_permutation,
    "patch_shuffle": patch_shuffle,
    "mask_transplant": mask_transplant,
}
_ABLATIONS = {"keep_only": keep_only, "remove": remove}
_TARGETS = ("full", "centre", "wmap")


class _Shown(NamedTuple):
    """One image of the series: condition, neuron and start, as positions in the lists of the source."""

    condition: int
    neuron: int
    start: int


class ControlSource:
    """The optimal image of a neuron's model next to those of models in which one property is destroyed.

    Every block has each condition of one neuron once, all from the same start noise. Within blocks the order of
    conditions is counterbalanced by a balanced Latin square (Williams 1949): over n blocks (2 n for an odd number of
    conditions) each condition is at each place, and follows each other one, equally often. The order of blocks is drawn
    from the seed. Every image is shown `repeats` times. A session may shuffle the presentations of a batch further.

    Labels, and the decision that is journaled, are "neuron/condition/start" of each image. Images are made when a block
    first needs them, or all together by `prepare()`.

    Args:
        model: fitted, with a source of features that gradients can pass.
        neurons: which; None: all that the fit did not exclude.
        conditions: "optimal" (the model as it is); random controls "channel_permutation", "patch_shuffle" and
            "mask_transplant"; "sign_flip"; and of one factor "keep_only:0", "remove:0", and the published targets
            "full:0", "centre:0", "wmap:0". See `cortexloop.factor.controls`.
        draws: how often each random control is drawn, as conditions of their own: "patch_shuffle#0", ...
        starts: images from different noise per neuron and condition.
        repeats: presentations of each image.
        per_batch: images per proposal; None: one block.
        seed: of controls, noise and order.
        score, steps, step_size, blur, blur_every: see `factor.optimal_images`.
        max_open: proposals that may be out.

    Attributes:
        conditions: with the draws written out.
        stuck: labels of images made so far whose score never changed, which are therefore noise.

    Raises:
        ValueError, IndexError: an unknown condition, neuron or factor, a model without source, or numbers out of range.
    """

    def __init__(
        self,
        model: FactorModel,
        *,
        neurons: Sequence[int] | None = None,
        conditions: Sequence[str] = CONDITIONS,
        draws: int = 1,
        starts: int = 1,
        repeats: int = 1,
        per_batch: int | None = None,
        seed: int = 0,
        score: Literal["dot", "cosine"] = "cosine",
        steps: int = 100,
        step_size: float = 10.0,
        blur: float = 1.0,
        blur_every: int = 50,
        max_open: int = 2,
    ) -> None:
        if model.source is None:
            raise ValueError("images are made through the network of the model: load it with a source of features")
        for name, value, low in (
            ("draws", draws, 1), ("starts", starts, 1), ("repeats", repeats, 1), ("per_batch", per_batch, 1),
            ("seed", seed, 0), ("steps", steps, 1), ("max_open", max_open, 1),
        ):  # fmt: skip
            common.check_count(name, value, low)
        if score not in ("dot", "cosine"):
            raise ValueError(f'score should be "dot" or "cosine", got {score!r}')
        self.size = image_size(model.source)
        self.max_open = max_open
        self._model, self._source, self._neurons = model, model.source, _neurons(model, neurons)
        made = [made for text in conditions for made in _condition(model.readout, text, draws, seed)]
        self.conditions = [name for name, _, _ in made]
        if not made or len(set(self.conditions)) < len(made):
            raise ValueError(f"conditions should be one or more different ones, got {list(conditions)}")
        self._weights = [weights for _, weights, _ in made]
        self._records = {name: control.to_json() for name, _, control in made if control is not None}
        self._starts, self._repeats, self._seed = starts, repeats, seed
        self._per_batch = len(made) if per_batch is None else per_batch
        self._options: dict[str, Any] = {
            "score": score,
            "steps": steps,
            "step_size": step_size,
            "blur": blur,
            "blur_every": blur_every,
        }
        self._series = self._ordered()
        self._images: dict[tuple[int, int], Images] = {}
        self._ledger = common.Ledger("images of conditions")
        self.stuck: list[str] = []
        arrays, _ = model.readout.arrays()
        self._settings = {
            "source": "controls",
            "readout_sha256": sha256(*(part for name in sorted(arrays) for part in (name, arrays[name]))),
            "features": common.features_settings(model.source),
            "size": list(self.size),
            "neurons": self._neurons,
            "conditions": self.conditions,
            "controls_sha256": {name: sha256(record) for name, record in self._records.items()},
            "starts": starts,
            "repeats": repeats,
            "per_batch": self._per_batch,
            "seed": seed,
            "order_sha256": sha256(np.array(self._series, dtype=np.int64)),
            "max_open": max_open,
            **self._options,
        }

    @property
    def controls(self) -> dict[str, Control]:
        """The controls by condition, from which their factors can be made again."""
        return {name: Control.from_json(record) for name, record in self._records.items()}

    def settings(self) -> dict[str, Any]:
        """See `Source`."""
        return dict(self._settings)

    def prepare(self) -> None:
        """Make all images now."""
        for condition in range(len(self.conditions)):
            for neuron in range(len(self._neurons)):
                self._made(condition, neuron)

    def propose(self, decision: Any = None) -> Proposal | None:
        """See `Source`.

        Raises:
            ValueError: a decision of another source.
        """
        first = self._ledger.proposed * self._per_batch
        shown = self._series[first : first + self._per_batch]
        if not shown:
            return None
        labels = [self._label(image) for image in shown]
        if decision is not None and decision != {"conditions": labels}:
            raise common.foreign("other images are due")
        self._ledger.put(len(shown), *labels)
        return Proposal(
            count=len(shown),
            render=lambda: np.stack([self._made(image.condition, image.neuron)[image.start] for image in shown]),
            labels=labels,
            decision={"conditions": labels},
        )

    def learn(self, scores: Double, responses: Double) -> None:
        """See `Source`.

        Raises:
            RuntimeError, ValueError: nothing is out, or another number of scores.
        """
        self._ledger.take(scores)

    def digest(self) -> str:
        """See `Source`."""
        return self._ledger.digest()

    def _label(self, image: _Shown) -> str:
        return f"{self._neurons[image.neuron]}/{self.conditions[image.condition]}/{image.start}"

    def _ordered(self) -> list[_Shown]:
        """The whole series, block by block."""
        rng = np.random.default_rng([self._seed, 1])
        square = williams(len(self.conditions))
        names = rng.permutation(len(self.conditions)).tolist()  # which condition is which letter of the square
        blocks = [(neuron, start) for neuron in range(len(self._neurons)) for start in range(self._starts)]
        series: list[_Shown] = []
        row = 0
        for _ in range(self._repeats):
            for block in rng.permutation(len(blocks)).tolist():
                neuron, start = blocks[block]
                series += [_Shown(names[letter], neuron, start) for letter in square[row % len(square)].tolist()]
                row += 1
        return series

    def _made(self, condition: int, neuron: int) -> Images:
        """uint8 [starts, H, W, 3]. Each neuron and condition by itself, so that no image depends on what is asked."""
        if (condition, neuron) not in self._images:
            weights = self._weights[condition].select([self._neurons[neuron]])
            found = optimal_images(
                weights, self._source, starts=self._starts, seed=self._seed, shape=self.size, **self._options
            )
            self._images[condition, neuron] = np.rint(found.images[0]).astype(np.uint8)
            self.stuck += [self._label(_Shown(condition, neuron, int(s))) for s in np.flatnonzero(found.stuck[0])]
        return self._images[condition, neuron]


def williams(count: int) -> NDArray[np.int64]:
    """A balanced Latin square: rows are orders of 0..count - 1. count rows, twice as many for an odd count above 1.

    Over all rows each number is at each place equally often, and directly before each other one equally often.

    Source: Williams 1949, Australian Journal of Scientific Research 2:149.
    """
    zigzag = [(i + 1) // 2 if i % 2 else (count - i // 2) % count for i in range(count)]
    square = (np.array(zigzag, dtype=np.int64) + np.arange(count)[:, None]) % count
    return square if count % 2 == 0 or count == 1 else np.concatenate([square, square[:, ::-1]])


def _neurons(model: FactorModel, chosen: Sequence[int] | None) -> list[int]:
    """Positions of neurons that have weights.

    Raises:
        ValueError: one that does not exist or was excluded, one twice, or none.
    """
    excluded = {n: reason for reason, neurons in model.excluded.items() for n in neurons}
    found = [n for n in range(len(model)) if n not in excluded] if chosen is None else [int(n) for n in chosen]
    for n in found:
        if not 0 <= n < len(model):
            raise ValueError(f"neurons should lie in 0..{len(model) - 1}, got {n}")
        if n in excluded:
            raise ValueError(f"neuron {n} was not fitted ({excluded[n]}), so it has no preferred image; leave it out")
    if not found or len(set(found)) < len(found):
        raise ValueError(f"neurons should be one or more different ones, got {found}")
    return found


def _condition(factors: Factors, text: str, draws: int, seed: int) -> list[tuple[str, Factors, Control | None]]:
    """(name, weights, record of the control) of a condition; several for a random one.

    Raises:
        ValueError: an unknown condition, or a factor that is missing or superfluous.
    """
    kind, _, number = text.partition(":")
    if kind in (*_ABLATIONS, *_TARGETS):
        if not number.isdigit():
            raise ValueError(f"{kind!r} is of one factor: write {kind}:0, got {text!r}")
        if kind in _TARGETS:
            return [(text, target(factors, kind, int(number)), None)]  # type: ignore[arg-type]
        control = _ABLATIONS[kind](factors, int(number))
        return [(text, control.apply(factors), control)]
    if text == "optimal":
        return [(text, factors, None)]
    if text == "sign_flip":
        control = sign_flip(factors)
        return [(text, control.apply(factors), control)]
    if text in _RANDOM:
        made = [_RANDOM[text](factors, seed=seed + draw) for draw in range(draws)]
        names = [text] if draws == 1 else [f"{text}#{draw}" for draw in range(draws)]
        return [(name, control.apply(factors), control) for name, control in zip(names, made, strict=True)]
    known = ["optimal", *_RANDOM, "sign_flip", *(f"{name}:<factor>" for name in (*_ABLATIONS, *_TARGETS))]
    raise ValueError(f"a condition should be one of {', '.join(known)}, got {text!r}")

"""Masks and vectors fitted to the responses themselves: by alternating ridge regressions, or by gradient descent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cortexloop.factor._checks import Array, floats
from cortexloop.factor.factorize import cropped, in_order
from cortexloop.factor.factors import Factors
from cortexloop.factor.scores import linear_score, mask_features, readout, vector_features
from cortexloop.regression import ridge

ALPHAS = tuple(10.0**k for k in range(-6, 7))


@dataclass(frozen=True, eq=False)
class JointFit:
    """Responses = sum_f <masks, vectors, features> + intercept."""

    factors: Factors
    intercept: Tensor
    """[T]"""
    history: Tensor
    """float64 [steps, T]. "als": leave-one-out R^2 of the vectors after each round (the first: of the start's masks);
    "gradient": training loss of each epoch, in units of the response's variance."""
    excluded: list[int]
    """Neurons with constant responses: their factors are 0, their intercept is that constant."""

    def predict(self, features: Array) -> Tensor:
        """Predicted responses [B, T] to features [B, C, H, W]."""
        x = floats(features, "features", 4).to(self.factors.masks)
        return linear_score(x, self.factors) + self.intercept


def fit_joint(
    features: Array,
    responses: Array,
    *,
    method: Literal["als", "gradient"] = "als",
    start: Factors | None = None,
    rank: int = 3,
    border: int = 1,
    seed: int = 0,
    **options: Any,
) -> JointFit:
    """Fit masks >= 0 and vectors of all neurons to their responses.

    Args:
        features: [B, C, H, W] of the training images only, in memory.
        responses: [B, T], finite.
        method: "als", see `fit_alternating`, or "gradient", see `fit_by_gradient`.
        start: factors to start from; their rank and border hold. None: random masks (and vectors).
        rank, border: without `start`.
        seed: of the random start and of the order of images.
        options: of the method.

    Raises:
        TypeError, ValueError: arrays that do not fit together or are not finite, or an unknown method.
    """
    x, y = _pair(features, responses)
    if method not in ("als", "gradient"):
        raise ValueError(f'method should be "als" or "gradient", got {method!r}')
    if start is None:
        start = _random_start(x, y.shape[1], rank, border, seed)
    elif start.feature_shape != tuple(x.shape[1:]) or len(start) != y.shape[1]:
        raise ValueError(
            f"start is for {len(start)} neurons on maps {list(start.feature_shape)}, responses are of {y.shape[1]} "
            f"neurons and features {list(x.shape[1:])}"
        )
    start = start.to(x.device)
    if method == "als":
        return fit_alternating(x, y, start, **options)
    return fit_by_gradient(x, y, start, seed=seed, **options)


def fit_alternating(
    features: Tensor,
    responses: Tensor,
    start: Factors,
    *,
    rounds: int = 4,
    alphas: Sequence[float] = ALPHAS,
    folds: int | None = None,
    nonnegative: bool = True,
) -> JointFit:
    """Alternating ridge regressions: vectors for given masks, then masks for given vectors.

    Each regression chooses its alpha by leave-one-out (or folds). With `nonnegative`, the masks are then solved for
    again under h >= 0 with that alpha. Every round ends with the vectors, whose cross-validated score is known; the
    best round is returned, so that the result is never worse by that score than the start's masks.

    Args: see `fit_joint`.
        rounds: 4 in the published code.
        nonnegative: False: masks of either sign, as there.
    """
    if rounds < 0:
        raise ValueError(f"rounds should be at least 0, got {rounds}")
    x, y = features, responses
    count, r = start.masks.shape[:2]
    c, h, w = start.feature_shape
    border = start.border
    masks, vectors = torch.zeros_like(start.masks), torch.zeros_like(start.vectors)
    intercept = y.double().mean(0)
    history = torch.zeros(rounds + 1, count, dtype=torch.float64)
    excluded = _constant(y)
    for t in sorted(set(range(count)) - set(excluded)):
        target = y[:, t : t + 1]
        mask = start.masks[t : t + 1]
        vector = start.vectors[t : t + 1]
        best = -torch.inf
        for round_ in range(rounds + 1):
            if round_ > 0:
                here = start.replaced(mask, vector, method="als")
                seen = cropped(vector_features(x, here)[:, 0], border).flatten(1)
                model = ridge(seen, target, alphas, folds)
                solution = model.weights[0]
                if nonnegative:
                    solution = _nonnegative_ridge(seen, target, float(model.alpha[0]), solution)
                found = solution.to(mask).view(1, r, h - 2 * border, w - 2 * border)
                if not bool(found.any()):
                    break  # no mask of positive weights helps: what is there stays
                mask = torch.zeros_like(mask)
                cropped(mask, border).copy_(found / found.flatten(2).norm(dim=2).clamp(min=1e-30)[..., None, None])
            seen = mask_features(x, start.replaced(mask, vector, method="als"))[:, 0].flatten(1)
            model = ridge(seen, target, alphas, folds)
            vector = model.weights[0].to(mask).view(1, r, c)
            score = float(model.score[0])
            history[round_:, t] = score
            if score > best:
                best = score
                masks[t], vectors[t], intercept[t] = mask[0], vector[0], model.intercept[0]
    return _joint(masks, vectors, intercept, history, excluded, start, "als", {"rounds": rounds})


def fit_by_gradient(
    features: Tensor,
    responses: Tensor,
    start: Factors,
    *,
    seed: int = 0,
    epochs: int = 15,
    batch: int = 60,
    learning_rate: float = 5e-3,
    smoothness: float = 1e-3,
    sparsity: float = 0.0,
    mask_decay: float = 1e-3,
    vector_decay: float = 1e-3,
) -> JointFit:
    """Adam on the squared error and penalties, masks projected onto h >= 0 after every step; all neurons in one batch.

    Loss of a neuron, responses z-scored and features standardised per channel (with 1 % of the mean variance added):
    mean squared error + smoothness mean (Laplacian of h)^2 + sparsity mean |h| + mask_decay mean h^2 + vector_decay
    mean w^2. The factors returned are for features and responses as given.

    Args: see `fit_joint`.
        epochs, batch, learning_rate: 15, 60 and 5e-3 as published.
    """
    if epochs < 1 or batch < 1 or learning_rate <= 0 or min(smoothness, sparsity, mask_decay, vector_decay) < 0:
        raise ValueError(
            "epochs and batch should be at least 1, learning_rate positive and penalties not negative, got "
            f"{epochs}, {batch}, {learning_rate}, {(smoothness, sparsity, mask_decay, vector_decay)}"
        )
    x = cropped(features, start.border)
    excluded = _constant(responses)
    mean = x.mean((0, 2, 3))
    variance = x.var((0, 2, 3), correction=0)
    deviation = (variance + 0.01 * variance.mean()).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
    y_mean = responses.double().mean(0)
    y_deviation = responses.double().std(0, correction=0)
    y_deviation = torch.where(y_deviation > 0, y_deviation, 1.0)
    y = ((responses.double() - y_mean) / y_deviation).to(x.dtype)

    masks = cropped(start.masks, start.border).clone().clamp_(min=0)
    vectors = start.vectors * deviation
    masks, vectors, bias = _scaled(x, y, mean, deviation, masks, vectors)
    parameters = [p.detach().clone().requires_grad_() for p in (masks, vectors, bias)]
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    history = torch.zeros(epochs, y.shape[1], dtype=torch.float64)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for part in torch.split(order, batch):
            shown = (x[part] - mean[:, None, None]) / deviation[:, None, None]
            h, w, b = parameters
            error = readout(shown, h, w) + b - y[part]
            loss = error.square().mean(0)
            with torch.no_grad():
                history[epoch] += loss.double().cpu() * (len(part) / len(x))
            loss = loss + mask_decay * h.square().mean((1, 2, 3)) + vector_decay * w.square().mean((1, 2))
            if sparsity:
                loss = loss + sparsity * h.abs().mean((1, 2, 3))
            if smoothness and min(h.shape[2:]) >= 3:
                loss = loss + smoothness * _laplacian(h).square().mean((1, 2, 3))
            optimiser.zero_grad()
            loss.sum().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            with torch.no_grad():
                h.clamp_(min=0)
    h, w, b = (p.detach() for p in parameters)
    used = torch.ones(len(h), dtype=torch.bool, device=h.device)
    used[excluded] = False
    h, w, b = h * used[:, None, None, None], w * used[:, None, None], b * used
    raw = w * (y_deviation.to(w)[:, None, None] / deviation)
    shift = torch.einsum("trc,c,tr->t", raw.double(), mean.double(), h.sum((2, 3)).double())
    intercept = y_mean + y_deviation * b.double() - shift
    full = torch.zeros_like(start.masks)
    cropped(full, start.border).copy_(h)
    settings = {
        "epochs": epochs,
        "batch": batch,
        "learning_rate": learning_rate,
        "smoothness": smoothness,
        "sparsity": sparsity,
        "mask_decay": mask_decay,
        "vector_decay": vector_decay,
        "seed": seed,
    }
    return _joint(full, raw, intercept, history, excluded, start, "gradient", settings)


def _pair(features: Array, responses: Array) -> tuple[Tensor, Tensor]:
    x = floats(features, "features", 4)
    y = floats(responses, "responses", 2).to(x.device, x.dtype)
    if len(x) != len(y) or len(x) < 3:
        raise ValueError(f"features and responses should be of the same, at least 3, images, got {len(x)} and {len(y)}")
    return x, y


def _constant(responses: Tensor) -> list[int]:
    return [int(t) for t in torch.nonzero((responses == responses[:1]).all(0))[:, 0]]


def _random_start(x: Tensor, count: int, rank: int, border: int, seed: int) -> Factors:
    _, c, h, w = x.shape
    inner = cropped(x, border)
    most = min(c, inner.shape[2] * inner.shape[3])
    if not 1 <= rank <= most:
        raise ValueError(f"rank should lie in 1..{most}, the smaller of channels and positions, got {rank}")
    generator = torch.Generator().manual_seed(seed)
    masks = x.new_zeros(count, rank, h, w)
    drawn = torch.rand((count, rank, *inner.shape[2:]), generator=generator, dtype=torch.float64)
    cropped(masks, border).copy_(drawn * (0.75 / (inner.shape[2] * inner.shape[3])) ** 0.5)
    vectors = torch.randn((count, rank, c), generator=generator, dtype=torch.float64) / c**0.5
    return Factors(masks, vectors.to(x), "random", border)


def _nonnegative_ridge(x: Tensor, y: Tensor, alpha: float, start: Tensor, iterations: int = 1000) -> Tensor:
    """argmin |y - X h - b|^2 + alpha |h|^2 with h >= 0, float64 [P]: accelerated projected gradient with restarts."""
    x, y = x.double(), y[:, 0].double()
    x, y = x - x.mean(0), y - y.mean()
    gram = x.T @ x
    gram.diagonal().add_(alpha)
    product = x.T @ y
    step = 1.0 / torch.linalg.matrix_norm(gram, 2).clamp(min=1e-300)
    h = start.double().clamp(min=0)
    ahead, momentum = h, 1.0
    for _ in range(iterations):
        gradient = gram @ ahead - product
        moved = (ahead - step * gradient).clamp(min=0)
        change = moved - h
        if float((gradient * change).sum()) > 0:
            momentum = 1.0
        following = 0.5 * (1.0 + (1.0 + 4.0 * momentum**2) ** 0.5)
        ahead = moved + ((momentum - 1.0) / following) * change
        h, momentum = moved, following
        if float(change.norm()) <= 1e-9 * float(h.norm()):
            break
    return h


def _scaled(
    x: Tensor, y: Tensor, mean: Tensor, deviation: Tensor, masks: Tensor, vectors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The start, scaled so that it predicts as well as it can, the scale shared evenly by masks and vectors."""
    parts = [
        readout((part - mean[:, None, None]) / deviation[:, None, None], masks, vectors) for part in torch.split(x, 256)
    ]
    scores = torch.cat(parts).double()
    centre = scores.mean(0)
    spread = scores - centre
    power = spread.square().sum(0)
    gain = torch.where(power > 0, (spread * y.double()).sum(0) / power.clamp(min=1e-300), 1.0)
    masks, vectors = masks.clone(), vectors * gain.to(vectors)[:, None, None]
    sizes = masks.flatten(2).norm(dim=2), vectors.norm(dim=2)
    both = (sizes[0] > 0) & (sizes[1] > 0)
    ratio = torch.where(both, (sizes[1] / sizes[0].clamp(min=1e-30)).sqrt(), 1.0)
    return masks * ratio[..., None, None], vectors / ratio[..., None], (-gain * centre).to(vectors)


def _laplacian(masks: Tensor) -> Tensor:
    inner = 4.0 * masks[..., 1:-1, 1:-1]
    return inner - masks[..., :-2, 1:-1] - masks[..., 2:, 1:-1] - masks[..., 1:-1, :-2] - masks[..., 1:-1, 2:]


def _joint(
    masks: Tensor,
    vectors: Tensor,
    intercept: Tensor,
    history: Tensor,
    excluded: list[int],
    start: Factors,
    method: str,
    settings: dict[str, Any],
) -> JointFit:
    flat, vectors = in_order(masks.flatten(2), vectors)
    factors = Factors(flat.view_as(masks), vectors, method, start.border, settings={"start": start.method, **settings})
    return JointFit(factors, intercept.to(masks.dtype), history, excluded)

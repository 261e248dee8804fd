"""Which covariances of a neuron with features to keep: thresholds on their t statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cortexloop.factor.moments import FeatureMoments

Kind = Literal["two_sided", "published", "negative", "fdr", "permutation", "familywise", "none"]
View = Literal["covariance_z", "covariance", "correlation", "t"]

DEFAULT_LEVELS: dict[str, float] = {
    "two_sided": 3.0,
    "published": 3.0,
    "negative": 3.0,
    "fdr": 0.05,
    "permutation": 5.0,
    "familywise": 0.05,
    "none": 0.0,
}


@dataclass(frozen=True, eq=False)
class Thresholded:
    """A view of the moments with what is not significant set to 0."""

    tensor: Tensor
    """[T, C, H, W] float32, 0 where a feature is dead or did not survive."""
    kept: Tensor
    """float64 [T]: the fraction of living features that survived."""
    level: Tensor
    """float64 [T]: the smallest |t| (|z| for "permutation") that survives; infinity where nothing can."""
    empty: list[int]
    """Neurons where nothing survived; their tensor is 0."""
    rule: dict[str, Any]
    """kind, level, view, and images; JSON-able."""

    def summary(self) -> str:
        """One line for people."""
        kept = self.kept * 100
        text = f"{self.rule['kind']} at {self.rule['level']:g} keeps "
        text += f"{float(kept.min()):.1f} to {float(kept.max()):.1f} % of features" if len(kept) else "nothing"
        return text + (f"; nothing is left of {len(self.empty)} neurons" if self.empty else "")


def threshold(
    moments: FeatureMoments, kind: Kind = "two_sided", *, level: float | None = None, view: View = "covariance_z"
) -> Thresholded:
    """Set to 0 the entries of a view whose correlation with the response may be chance.

    - "two_sided": |t| >= level (3) survives;
    - "published": t >= level (3): only positive correlations, the default of the published code (T threshold
      (-inf, 3)), although its factorization then splits positive from negative entries;
    - "negative": t <= -level (3);
    - "fdr": Benjamini-Hochberg over the living features of each neuron, two-sided, false discovery rate `level` (0.05);
    - "permutation": |correlation - mean| >= level (5) standard deviations, both over permutations of the responses;
    - "familywise": |t| above what the largest one of all features exceeds in a fraction `level` (0.05) of the
      permutations;
    - "none": everything survives.

    Features that did not vary are 0 in every view and never survive. t has n - 2 degrees of freedom, n the total weight
    of the images.

    Args:
        moments: at least 3 images; for the last two kinds, made with `permutations`.
        level: default as said above.
        view: what the surviving entries are: "covariance_z" (covariance with the z-scored response, published),
            "covariance", "correlation" or "t".

    Raises:
        ValueError: an unknown kind or view, a level out of range, or moments without the permutations asked for.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind should be one of {get_args(Kind)}, got {kind!r}")
    if view not in get_args(View):
        raise ValueError(f"view should be one of {get_args(View)}, got {view!r}")
    chosen = DEFAULT_LEVELS[kind] if level is None else float(level)
    share = kind in ("fdr", "familywise")
    if not (0 < chosen < 1 if share else 0 <= chosen < math.inf):
        raise ValueError(f"level of {kind!r} should be {'between 0 and 1' if share else 'at least 0'}, got {level}")
    values: Tensor = getattr(moments, view)()
    alive = ~moments.dead.to(values.device)
    if kind == "none":
        survives = alive.expand_as(values)
        reached = values.new_zeros(len(values), dtype=torch.float64)
    elif kind == "permutation":
        reached = values.new_full((len(values),), chosen, dtype=torch.float64)
        survives = (moments.z().abs() >= chosen) & alive
    else:
        t = values if view == "t" else moments.t()
        if kind == "familywise":
            reached = moments.max_t_threshold(chosen).to(t.device, torch.float64)
            survives = (t.abs().double() > reached[:, None, None, None]) & alive
        elif kind == "fdr":
            reached = benjamini_hochberg(t.flatten(1)[:, alive.flatten()], moments.count - 2.0, chosen)
            survives = (t.abs().double() >= reached[:, None, None, None]) & alive
        else:
            reached = t.new_full((len(t),), chosen, dtype=torch.float64)
            signed = {"two_sided": t.abs(), "published": t, "negative": -t}[kind]
            survives = (signed >= chosen) & alive
    tensor = torch.where(survives, values, 0.0)
    kept = survives.flatten(1).sum(1).double() / max(1, int(alive.sum()))
    return Thresholded(
        tensor=tensor,
        kept=kept,
        level=reached,
        empty=torch.nonzero(~tensor.flatten(1).any(1))[:, 0].tolist(),
        rule={"kind": kind, "level": chosen, "view": view, "images": moments.count},
    )


def benjamini_hochberg(t: Tensor, freedom: float, rate: float) -> Tensor:
    """The smallest |t| that is significant at a false discovery rate, per row; infinity where none is.

    Benjamini & Hochberg 1995: of m p values in rising order, all up to the largest k with p_k <= k rate / m.

    Args:
        t: [T, m]. freedom: degrees of freedom.

    Returns:
        float64 [T].
    """
    m = t.shape[1]
    largest = t.abs().double().sort(dim=1, descending=True).values
    bound = torch.arange(1, m + 1, dtype=torch.float64, device=t.device) * (rate / max(m, 1))
    passes = two_sided_p(largest, freedom) <= bound
    last = torch.where(passes, torch.arange(m, device=t.device), -1).amax(1) if m else t.new_full((len(t),), -1).long()
    if m == 0:
        return torch.full((len(t),), torch.inf, dtype=torch.float64, device=t.device)
    value = largest.gather(1, last.clamp(min=0)[:, None])[:, 0]
    return torch.where(last >= 0, value, torch.inf)


def two_sided_p(t: Tensor, freedom: float) -> Tensor:
    """P(|T| >= |t|) of Student's t, float64; relative error below 1e-3 from 5 degrees of freedom on (2e-5 from 10).

    By Hill's transformation to a normal deviate (Communications of the ACM 13, 1970).
    """
    a = freedom - 0.5
    b = 48.0 * a * a
    z = torch.sqrt(a * torch.log1p(t.double().square() / freedom))
    z2 = z * z
    z = (
        z
        + z * (z2 + 3.0) / b
        - z * (((4.0 * z2 + 33.0) * z2 + 240.0) * z2 + 855.0) / (10.0 * b * (b + 0.8 * z2 * z2 + 100.0))
    )
    return torch.erfc(z / math.sqrt(2.0))

"""What running moments say: covariances, correlations, t statistics, and how they compare with chance."""

from __future__ import annotations

import torch
from torch import Tensor

from cortexloop.factor.permutations import Permutations, exceeded_by, null_statistics
from cortexloop.functional import MomentState

_SMALLEST = 1e-36  # variance whose square root float32 can still square
_ROUNDING = 2.0**-23
_ALL = slice(None)


class MomentViews:
    """Views of the moments of features [C, H, W] and the responses of T neurons; `FeatureMoments` fills them."""

    feature_shape: tuple[int, int, int]
    neurons: int
    names: tuple[str, ...]
    device: torch.device
    _state: MomentState
    _permutations: Permutations | None

    @property
    def permutations(self) -> int:
        """P, the number of permutations; 0 without."""
        return 0 if self._permutations is None else len(self._permutations)

    @property
    def count(self) -> float:
        """n, the total weight of the images that were used."""
        return self._state.total

    @property
    def response_mean(self) -> Tensor:
        """Mean response, float64 [T]."""
        return self._state.response_mean[: self.neurons].clone()

    @property
    def response_sd(self) -> Tensor:
        """Standard deviation of the responses (over trials, if there are any), float64 [T]."""
        return (self._state.response_m2[: self.neurons] / self._n()).sqrt()

    @property
    def feature_mean(self) -> Tensor:
        """Mean of every feature, float64 [C, H, W]."""
        return self._state.mean.reshape(self.feature_shape).clone()

    @property
    def feature_sd(self) -> Tensor:
        """Standard deviation of every feature, float64 [C, H, W]."""
        return (self._state.m2 / self._n()).sqrt().reshape(self.feature_shape)

    @property
    def dead(self) -> Tensor:
        """bool [C, H, W]: features that did not vary: sd at most 2^-23 |mean| (float32's rounding) or 1e-18."""
        state = self._state
        bound = (_ROUNDING * state.mean).square().clamp(min=_SMALLEST)
        return (state.m2 / self._n() <= bound).reshape(self.feature_shape)

    @property
    def constant_responses(self) -> list[str]:
        """Names of the neurons whose responses did not vary (sd at most 1e-12 of the mean): nothing correlates."""
        varies = self._varies()[: self.neurons].tolist()
        return [name for name, changes in zip(self.names, varies, strict=True) if not changes]

    def covariance(self) -> Tensor:
        """Covariance of features and responses, in units of both."""
        return self._view(torch.ones_like(self._state.response_m2), None)

    def covariance_z(self) -> Tensor:
        """Covariance of features with the z-scored response, cov / sd_y: what the published code calls covtsr."""
        return self._view(self._inverse_sd(), None)

    def correlation(self) -> Tensor:
        """Pearson correlation of features and responses, in [-1, 1]."""
        return self._view(self._inverse_sd(), self._inverse_feature_sd()).clamp_(-1.0, 1.0)

    def t(self) -> Tensor:
        """t statistic of the correlation r, sqrt(n - 2) r / sqrt(1 - r^2); n is the total weight.

        1 - r^2 is taken as at least 2^-23, what rounding leaves of it, so that t stays finite.

        Raises:
            ValueError: n is not above 2.
        """
        return self._t_of(self.correlation())

    def null_mean(self) -> Tensor:
        """Mean correlation over permutations, [T, C, H, W].

        Raises:
            ValueError: made without permutations.
        """
        return self._over_permutations()[0]

    def null_sd(self) -> Tensor:
        """Standard deviation of the correlation over permutations, [T, C, H, W].

        Raises:
            ValueError: made without permutations.
        """
        return self._over_permutations()[1]

    def z(self) -> Tensor:
        """(correlation - null_mean) / null_sd, [T, C, H, W]; 0 for dead features and constant responses.

        Raises:
            ValueError: made without permutations.
        """
        mean, sd = self._over_permutations()
        known = sd > 0
        return torch.where(known, (self.correlation() - mean) / torch.where(known, sd, 1.0), 0.0)

    def max_t_null(self) -> Tensor:
        """The largest |t| over all features in each permutation, float32 [P, T].

        Raises:
            ValueError: made without permutations, or n is not above 2.
        """
        self._need_permutations()
        inverse, feature = self._inverse_sd(), self._inverse_feature_sd()
        rows = []
        for p in range(1, self.permutations + 1):
            r = self._view(inverse, feature, p).clamp_(-1.0, 1.0)
            rows.append(self._t_of(r).abs().flatten(1).amax(1))
        return torch.stack(rows)

    def max_t_threshold(self, alpha: float = 0.05) -> Tensor:
        """|t| that any feature of a neuron exceeds by chance with probability at most alpha, [T] (family-wise).

        Infinite for constant responses.

        Raises:
            ValueError: made without permutations, or with too few for alpha.
        """
        varies = self._varies()[: self.neurons].to(self.device)
        return torch.where(varies, exceeded_by(self.max_t_null(), alpha), torch.inf)

    def _n(self) -> float:
        if self.count == 0:
            raise ValueError("there are no images yet; call update first")
        return self.count

    def _varies(self) -> Tensor:
        """bool [T (1 + P)]: responses that varied by more than float64's rounding of their sums."""
        state = self._state
        return (state.response_m2 / self._n()).sqrt() > 1e-12 * state.response_mean.abs()

    def _inverse_sd(self) -> Tensor:
        """1 / sd of the responses, float64 [T (1 + P)]; 0 where constant."""
        sd, varies = (self._state.response_m2 / self._n()).sqrt(), self._varies()
        return torch.where(varies, 1.0 / torch.where(varies, sd, 1.0), 0.0)

    def _inverse_feature_sd(self) -> Tensor:
        """1 / sd of the features, float64 [D]; 0 where dead."""
        sd, dead = self.feature_sd.flatten(), self.dead.flatten()
        return torch.where(dead, 0.0, 1.0 / torch.where(dead, 1.0, sd))

    def _view(self, rows: Tensor, columns: Tensor | None, permutation: int = 0, part: slice = _ALL) -> Tensor:
        """cross / n, times a number for each row, times one for each column; [T, C, H, W], or [T, d] of a part."""
        which = slice(permutation * self.neurons, (permutation + 1) * self.neurons)
        scale = (rows[which] / self._n()).float().to(self.device)[:, None]
        if columns is None:
            columns = (~self.dead.flatten()).double()
        values = self._state.cross[which, part] * scale * columns[part].float()
        return values if part != _ALL else values.reshape(self.neurons, *self.feature_shape)

    def _t_of(self, r: Tensor) -> Tensor:
        if self._n() <= 2:
            raise ValueError(f"t needs a total weight above 2, got {self.count:g}")
        scaled: Tensor = r * (self.count - 2.0) ** 0.5
        return scaled / (1.0 - r.square()).clamp_(min=_ROUNDING).sqrt_()

    def _need_permutations(self) -> None:
        if self._permutations is None:
            raise ValueError("these moments have no permutations; make them with FeatureMoments(..., permutations=P)")

    def _over_permutations(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the correlations, [T, C, H, W] each; a few columns at a time."""
        self._need_permutations()
        inverse, feature = self._inverse_sd(), self._inverse_feature_sd()
        step = max(1, (1 << 22) // (self.neurons * self.permutations))
        parts = []
        for start in range(0, len(feature), step):
            part = slice(start, start + step)
            r = [self._view(inverse, feature, p, part) for p in range(1, self.permutations + 1)]
            parts.append(null_statistics(torch.stack(r).clamp_(-1.0, 1.0)))
        mean, sd = (torch.cat(values, dim=1).float() for values in zip(*parts, strict=True))
        shape = (self.neurons, *self.feature_shape)
        return mean.reshape(shape), sd.reshape(shape)

"""Baselines: they equal their regression on reduced features, and share the model's promises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cortexloop.factor import Baseline
from cortexloop.regression import PCA, SparseRandomProjection, ridge

SHAPE = (6, 5, 4)
TRAIN = 60


@pytest.fixture
def data(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Features [80, 6, 5, 4] with a mean far from 0, and responses [80, 3]: weighted sums with noise."""
    features = torch.from_numpy(rng.standard_normal((80, *SHAPE)) + 3).float()
    weights = torch.from_numpy(rng.standard_normal((3, 120))).float()
    return features, features.flatten(1) @ weights.T + torch.from_numpy(rng.standard_normal((80, 3))).float()


@pytest.mark.parametrize("kind", ["average", "dense", "pca", "srp"])
def test_held_out_responses_have_no_influence(data: tuple[Tensor, Tensor], kind: str, tmp_path: Path):
    features, responses = data
    options = {"kind": kind, "train": range(TRAIN)}
    if kind in ("pca", "srp"):
        options["components"] = 20
    model = Baseline.fit(None, features, responses, **options)
    spoiled = responses.clone()
    spoiled[TRAIN:] = torch.nan
    other = Baseline.fit(None, features, spoiled, **options)
    assert torch.equal(model.readout, other.readout)
    assert torch.equal(model.intercept, other.intercept)
    model.save(tmp_path / "baseline")
    back = Baseline.load(tmp_path / "baseline")
    assert torch.equal(back.predict(features), model.predict(features))
    assert back.settings == model.settings
    expected = features.flatten(1).double() @ model.weights().flatten(1).double().T + model.intercept
    torch.testing.assert_close(model.predict(features).double(), expected, rtol=1e-4, atol=1e-3)
    report = model.report(features[TRAIN:], responses[TRAIN:])
    assert set(report) == {"pearson", "spearman", "r2", "fev"}
    assert "3 neurons" in model.summary()


def test_average_and_dense_are_their_regressions(data: tuple[Tensor, Tensor]):
    features, responses = data
    for kind, reduced in (("average", features.mean((2, 3))), ("dense", features.flatten(1))):
        model = Baseline.fit(None, features, responses, kind=kind, train=range(TRAIN))
        alone = ridge(reduced[:TRAIN], responses[:TRAIN])
        expected = alone.predict(reduced)
        torch.testing.assert_close(model.predict(features).double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("unsupervised", [False, True])
def test_components_in_the_map(data: tuple[Tensor, Tensor], unsupervised: bool):
    """Weights in the map predict as the regression on components does."""
    features, responses = data
    natural = torch.from_numpy(np.random.default_rng(1).standard_normal((50, *SHAPE))).float() if unsupervised else None
    model = Baseline.fit(None, features, responses, components=25, train=range(TRAIN), unsupervised=natural)
    pca = PCA(25).fit((features[:TRAIN] if natural is None else natural).flatten(1))
    alone = ridge(pca.transform(features[:TRAIN].flatten(1)), responses[:TRAIN])
    expected = alone.predict(pca.transform(features.flatten(1)))
    torch.testing.assert_close(model.predict(features).double(), expected, rtol=1e-3, atol=1e-2)


def test_projections_in_the_map(data: tuple[Tensor, Tensor]):
    features, responses = data
    model = Baseline.fit(None, features, responses, kind="srp", components=30, train=range(TRAIN), seed=4)
    projection = SparseRandomProjection(30, seed=4)
    alone = ridge(projection.transform(features[:TRAIN].flatten(1)), responses[:TRAIN])
    expected = alone.predict(projection.transform(features.flatten(1)))
    torch.testing.assert_close(model.predict(features).double(), expected, rtol=1e-3, atol=1e-2)


def test_constant_neurons_are_listed(data: tuple[Tensor, Tensor]):
    features, responses = data[0], data[1].clone()
    responses[:, 1] = 2.0
    model = Baseline.fit(None, features, responses, kind="average")
    assert model.excluded == {"constant": [1]}
    torch.testing.assert_close(model.predict(features)[:, 1], torch.full((80,), 2.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "pls"}, "kind should be one of"),
        ({"regressor": "svm"}, "regressor should be"),
        ({"kind": "dense", "components": 3}, "no components to choose"),
        ({"kind": "average", "unsupervised": torch.zeros(3, *SHAPE)}, "learns from images alone"),
        ({"kind": "average", "train": [0, 1]}, "at least 4 training images"),
    ],
)
def test_bad_choices_are_refused(data: tuple[Tensor, Tensor], options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        Baseline.fit(None, *data, **options)

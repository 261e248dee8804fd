"""FactorModel: what it recovers, that the test set has no influence, and what it does with bad neurons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cortexloop import io
from cortexloop.factor import FactorModel, Factors, factorize, fit_joint, score, threshold
from cortexloop.factor.model import KIND
from cortexloop.factor.moments import FeatureMoments
from cortexloop.features import ModuleFeatures

C, H, W = 8, 7, 6
IMAGES, TRAIN = 300, 240


@pytest.fixture
def truth(rng: np.random.Generator) -> Factors:
    """Six neurons that read two channels at a place of 2 x 2 positions each, with unit variance of the score."""
    masks, vectors = torch.zeros(6, 1, H, W), torch.zeros(6, 1, C)
    for t in range(6):
        y, x = 1 + t % 3, 1 + t % 2 * 2
        masks[t, 0, y : y + 2, x : x + 2] = 0.5
        vectors[t, 0, [t % C, (t + 3) % C]] = torch.tensor([1.0, -0.7])
    return Factors(masks, vectors, "truth")


@pytest.fixture
def data(truth: Factors, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Features [300, 8, 7, 6] and responses [300, 6]: a softplus of the true score, with noise."""
    features = torch.from_numpy(rng.standard_normal((IMAGES, C, H, W))).float()
    drive = score(features, truth)
    clean = 4 * torch.nn.functional.softplus(2 * drive / drive.std(0) - 0.5) + 1
    return features, clean + 0.3 * torch.from_numpy(rng.standard_normal(clean.shape)).float()


def fit(data: tuple[Tensor, Tensor], **options: object) -> FactorModel:
    features, responses = data
    options = {"rank": 1, "train": range(TRAIN), "border": 1, **options}
    return FactorModel.fit(None, features, responses, **options)


HELD_OUT = slice(TRAIN, None)


@pytest.mark.parametrize("method", ["posneg_nmf", "semi_nmf", "svd"])
def test_known_neurons_are_recovered(data: tuple[Tensor, Tensor], truth: Factors, method: str):
    model = fit(data, method=method)
    weights, true = model.weights().flatten(1), truth.tensor().flatten(1)
    cosine = (weights * true).sum(1) / (weights.norm(dim=1) * true.norm(dim=1))
    assert (cosine > 0.9).all()
    report = model.report(data[0][HELD_OUT], data[1][HELD_OUT])
    assert (report["pearson"] > 0.9).all()
    assert (report["r2"] > 0.8).all()
    assert (report["fev"] >= report["r2"] - 1e-6).all()
    assert (report["spearman"] > 0.85).all()
    assert not any(model.excluded.values())
    assert model.nonlinearity.converged.all()


OPTIONS = {
    "dot": {},
    "cosine, line": {"readout": "cosine", "nonlinearity": None},
    "corr": {"readout": "corr"},
    "normalised dot": {"normalise": True},
    "mask, ridge": {"reduction": "mask"},
    "vector, ridge": {"reduction": "vector", "rank": 2, "folds": 4},
    "factor, ridge": {"reduction": "factor", "nonlinearity": "softplus"},
    "mask, lasso": {"reduction": "mask", "regressor": "lasso"},
    "all features": {"threshold": "none", "nonlinearity": None},
    "fdr": {"threshold": "fdr", "view": "correlation"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_held_out_responses_have_no_influence(data: tuple[Tensor, Tensor], options: dict[str, object], tmp_path: Path):
    """Other responses and features of the test images, even NaN, leave every number of the model as it is."""
    model = fit(data, **options)
    features, responses = data[0].clone(), data[1].clone()
    features[HELD_OUT], responses[HELD_OUT] = 7.0, torch.nan
    other = fit((features, responses), **options)
    model.save(tmp_path / "a")
    other.save(tmp_path / "b")
    (arrays, header), (others, other_header) = (io.load_arrays(tmp_path / name, KIND) for name in "ab")
    assert header == other_header
    assert arrays.keys() == others.keys()
    for name, values in arrays.items():
        assert values.tobytes() == others[name].tobytes(), name
    assert (model.report(data[0][HELD_OUT], data[1][HELD_OUT])["pearson"] > 0.6).all()
    back = FactorModel.load(tmp_path / "a")
    assert torch.equal(back.predict(data[0]), model.predict(data[0]))
    assert (back.settings, back.excluded) == (model.settings, model.excluded)
    assert torch.equal(back.train, torch.arange(TRAIN))
    assert "6 neurons" in model.summary()


def test_predictions_are_the_weights_times_the_features(data: tuple[Tensor, Tensor]):
    for options in ({}, {"reduction": "mask"}, {"reduction": "vector"}, {"reduction": "factor"}):
        model = fit(data, nonlinearity=None, rank=2, **options)
        drive = torch.einsum("bchw,tchw->bt", data[0].double(), model.weights().double())
        expected = drive * model.gain + model.intercept
        torch.testing.assert_close(model.predict(data[0]).double(), expected, rtol=1e-4, atol=1e-4)


def test_regression_equals_one_neuron_by_itself(data: tuple[Tensor, Tensor]):
    """A regression on reduced features is that of the regression room, put back into the map."""
    from cortexloop.factor import mask_features
    from cortexloop.regression import ridge

    model = fit(data, reduction="mask", rank=2)
    reduced = mask_features(data[0], model.factors)
    for t in (0, 4):
        alone = ridge(reduced[:TRAIN, t].flatten(1), data[1][:TRAIN, t : t + 1])
        expected = alone.predict(reduced[HELD_OUT, t].flatten(1))[:, 0]
        torch.testing.assert_close(model.predict(data[0][HELD_OUT])[:, t].double(), expected, rtol=1e-4, atol=1e-4)
        assert float(model.alpha[t]) == float(alone.alpha[0])


def test_reductions_in_groups_give_the_same(data: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch):
    at_once = fit(data, reduction="mask")
    monkeypatch.setattr("cortexloop.factor.fitting._GROUP_BYTES", 1)
    in_turns = fit(data, reduction="mask")
    torch.testing.assert_close(in_turns.weights(), at_once.weights(), rtol=1e-5, atol=1e-6)


def test_unusable_neurons_are_listed_and_everything_is_finite(data: tuple[Tensor, Tensor]):
    features, responses = data[0].clone(), data[1].clone()
    responses[:, 1] = 5.0
    responses[:TRAIN, 3] = torch.tensor([1.0, 1.0, 2.0]).repeat(80)  # unrelated to any feature at this level
    features[:, 2] = 0.25  # a dead channel
    for options in (
        {"level": 4.5},
        {"level": 4.5, "nonlinearity": None, "readout": "corr"},
        {"level": 4.5, "reduction": "mask"},
        {"level": 4.5, "method": "svd"},
    ):
        model = fit((features, responses), **options)
        assert model.excluded["constant"] == [1]
        assert 3 in model.excluded["empty"]
        predicted = model.predict(features)
        assert torch.isfinite(predicted).all()
        torch.testing.assert_close(predicted[:, 1], torch.full((IMAGES,), 5.0))
        torch.testing.assert_close(predicted[:, 3], responses[:TRAIN, 3].mean().expand(IMAGES))
        assert not model.weights()[:, 2].any()
        for tensor in (model.weights(), model.gain, model.intercept, model.kept):
            assert torch.isfinite(tensor).all()
        assert "constant, predicted by their mean response: neurons 1" in model.summary()
        report = model.report(features[HELD_OUT], responses[HELD_OUT])
        assert np.isnan(report["pearson"][[1, 3]]).all()
        assert np.isfinite(report["pearson"][[0, 2, 4, 5]]).all()


def test_images_through_a_source(source: ModuleFeatures, rng: np.random.Generator, tmp_path: Path):
    """A model on images equals one on their features; it comes back with the source's settings."""
    images = rng.integers(0, 256, (60, 24, 24, 3), dtype=np.uint8)
    features = source(images)
    weights = torch.zeros(2, 6, 10, 10)
    weights[0, 1, 4:6, 4:6], weights[1, 3, 2:4, 6:8] = 1.0, 1.0
    responses = features.flatten(1) @ weights.flatten(1).T
    options = {"rank": 1, "train": np.arange(50), "level": 2.0}
    shown = FactorModel.fit(source, images, responses, **options)
    given = FactorModel.fit(None, features, responses, **options)
    streamed = FactorModel.fit(source, images, responses, keep=0, **options)
    torch.testing.assert_close(shown.predict(images), given.predict(features), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(streamed.predict(images), shown.predict(images), rtol=1e-4, atol=1e-4)
    shown.save(tmp_path / "model")
    back = FactorModel.load(tmp_path / "model", source)
    assert torch.equal(back.predict(images), shown.predict(images))
    assert back.settings["source"]["name"] == "tiny"
    assert "tiny" in back.summary()
    other = FactorModel.fit(None, torch.randn(9, 8, 7, 6), torch.randn(9, 1), rank=1, threshold="none")
    with pytest.raises(ValueError, match=r"maps \[8, 7, 6\]"):
        other.with_source(source)


def test_weights_of_images_count_repeats(data: tuple[Tensor, Tensor]):
    """An image with weight 2 is one shown twice, for the covariance."""
    features, responses = data[0][:40], data[1][:40]
    weights = torch.ones(40)
    weights[:10] = 2
    weighted = FactorModel.fit(None, features, responses, weights=weights, threshold="none", rank=2)
    twice = [*range(40), *range(10)]
    repeated = FactorModel.fit(None, features[twice], responses[twice], threshold="none", rank=2)
    torch.testing.assert_close(weighted.factors.tensor(), repeated.factors.tensor(), rtol=1e-3, atol=1e-4)


def test_given_factors_are_used(data: tuple[Tensor, Tensor], truth: Factors):
    model = fit(data, factors=truth)
    assert torch.equal(model.weights(), truth.tensor())
    assert (model.report(data[0][HELD_OUT], data[1][HELD_OUT])["r2"] > 0.9).all()


def test_ceiling(data: tuple[Tensor, Tensor], rng: np.random.Generator):
    model = fit(data)
    raw = data[1][HELD_OUT, :, None] + torch.from_numpy(rng.standard_normal((IMAGES - TRAIN, 6, 8))).float()
    report = model.report(data[0][HELD_OUT], raw.mean(2), raw=raw)
    assert ((report["ceiling"] > 0.9) & (report["ceiling"] < 1)).all()
    np.testing.assert_allclose(report["normalised"], report["pearson"] / report["ceiling"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 9}, r"rank should lie in 1\.\.8"),
        ({"train": [0, 1, 300]}, r"indices should lie in 0\.\.299"),
        ({"train": [0, 1, 1, 2]}, "train should name every image once"),
        ({"train": [0, 1]}, "at least 4 training images, got 2"),
        ({"readout": "euclid"}, "readout should be one of"),
        ({"reduction": "mask", "readout": "corr"}, "a regression predicts by a weighted sum"),
        ({"regressor": "svm"}, "regressor should be one of"),
        ({"threshold": "p"}, "kind should be one of"),
        ({"level": -1.0}, "level of 'two_sided' should be at least 0"),
        ({"view": "z"}, "view should be one of"),
        ({"weights": torch.ones(3)}, "weights should be one number for each of 300 images"),
    ],
)
def test_bad_choices_are_refused(data: tuple[Tensor, Tensor], options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        fit(data, **options)


def test_bad_data_is_refused(data: tuple[Tensor, Tensor], truth: Factors):
    features, responses = data
    broken = responses.clone()
    broken[3, 2] = torch.nan
    with pytest.raises(ValueError, match="responses of neurons 2 to training images are NaN"):
        fit((features, broken))
    maps = features.clone()
    maps[5, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="features of images 5 hold NaN or infinity"):
        fit((maps, responses))
    with pytest.raises(ValueError, match=r"of 300 images as the other input is; got \[299, 6\]"):
        fit((features, responses[1:]))
    with pytest.raises(ValueError, match="factors are of 2 neurons"):
        fit(data, factors=truth.select([0, 1]))
    with pytest.raises(ValueError, match="features should have 4 axes"):
        fit((features.flatten(1), responses))
    model = fit(data)
    with pytest.raises(ValueError, match=r"features should be \[B, 8, 7, 6\]"):
        model.predict(features[:, :4])
    with pytest.raises(ValueError, match="responses should be"):
        model.report(features, responses[:3])


def test_thresholds(data: tuple[Tensor, Tensor]):
    moments = FeatureMoments((C, H, W), 6)
    moments.update(data[0], data[1])
    t, values = moments.t(), moments.covariance_z()
    for kind, survives in (("two_sided", t.abs() >= 3), ("published", t >= 3), ("negative", t <= -3)):
        found = threshold(moments, kind)
        assert torch.equal(found.tensor, torch.where(survives, values, 0.0))
        torch.testing.assert_close(found.kept, survives.flatten(1).double().mean(1))
        assert found.empty == []
        assert kind in found.summary()
    assert torch.equal(threshold(moments, "none", view="t").tensor, t)
    assert threshold(moments, level=1e6).empty == list(range(6))
    assert torch.equal(factorize(threshold(moments, level=1e6).tensor, rank=1).tensor(), torch.zeros(6, C, H, W))


def test_false_discovery_rate_is_that_of_scipy(data: tuple[Tensor, Tensor]):
    from scipy import stats

    moments = FeatureMoments((C, H, W), 6)
    moments.update(data[0], data[1])
    found = threshold(moments, "fdr", level=0.1)
    t = moments.t().flatten(1).double().numpy()
    for neuron in range(6):
        p = 2 * stats.t.sf(np.abs(t[neuron]), IMAGES - 2)
        adjusted = stats.false_discovery_control(p)
        assert np.array_equal((found.tensor[neuron] != 0).flatten().numpy(), adjusted <= 0.1)


@pytest.mark.parametrize("method", ["als", "gradient"])
def test_joint_fits_predict(data: tuple[Tensor, Tensor], method: str):
    features, responses = data
    start = fit(data, threshold="none").factors
    options = {"rounds": 2} if method == "als" else {"epochs": 10, "learning_rate": 2e-2}
    found = fit_joint(features[:TRAIN], responses[:TRAIN], method=method, start=start, **options)
    assert (found.factors.masks >= 0).all()
    predicted = found.predict(features[HELD_OUT]).T.numpy()
    for t in range(6):
        assert np.corrcoef(predicted[t], responses[HELD_OUT, t].numpy())[0, 1] > 0.8
    again = fit_joint(features[:TRAIN], responses[:TRAIN], method=method, start=start, **options)
    assert torch.equal(again.factors.tensor(), found.factors.tensor())
    if method == "als":
        assert found.history.shape == (3, 6)
    else:
        assert (found.history[-1] < found.history[0]).all()


@pytest.mark.parametrize("method", ["als", "gradient"])
def test_joint_fits_from_nothing_and_with_constant_responses(data: tuple[Tensor, Tensor], method: str):
    features, responses = data[0][:100], data[1][:100].clone()
    responses[:, 2] = 3.0
    options = {"rounds": 1} if method == "als" else {"epochs": 2}
    found = fit_joint(features, responses, method=method, rank=2, seed=4, **options)
    assert found.excluded == [2]
    assert not found.factors.tensor()[2].any()
    assert torch.isfinite(found.predict(features)).all()
    torch.testing.assert_close(found.predict(features)[:, 2], torch.full((100,), 3.0))
    edge = found.factors.masks.clone()
    edge[..., 1:-1, 1:-1] = 0
    assert not edge.any()
    with pytest.raises(ValueError, match="method should be"):
        fit_joint(features, responses, method="lbfgs")
    with pytest.raises(ValueError, match="of the same, at least 3, images"):
        fit_joint(features, responses[:5])


def test_thresholds_by_permutation(data: tuple[Tensor, Tensor]):
    features, responses = data[0], data[1].clone()
    responses[:, 5] = torch.from_numpy(np.random.default_rng(8).standard_normal(IMAGES)).float()  # no feature drives it
    moments = FeatureMoments((C, H, W), 6, permutations=60, seed=1, responses=responses)
    moments.update(features, responses)
    strict, lenient = threshold(moments, "familywise"), threshold(moments, "permutation", level=4.0)
    assert strict.empty == [5]
    assert torch.equal(strict.tensor != 0, moments.t().abs() > strict.level.float()[:, None, None, None])
    assert torch.equal(lenient.tensor != 0, moments.z().abs() >= 4.0)
    assert (strict.kept[:5] > 0).all()
    model = fit((features, responses), threshold="familywise", permutations=40)
    assert model.excluded["empty"] == [5]
    without = FeatureMoments((C, H, W), 6)
    without.update(features, responses)
    with pytest.raises(ValueError, match="permutations"):
        threshold(without, "familywise")

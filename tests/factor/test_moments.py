"""Streaming moments: against two passes in float64, on data that is hard for sums; what is left out, and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import cortexloop as cl
from cortexloop.factor.moments import FeatureMoments

Float = NDArray[np.float64]
SHAPE = (5, 4, 3)
NEURONS = 4
VIEWS = ("covariance", "covariance_z", "correlation", "t")


def data(
    n: int = 300, shape: tuple[int, int, int] = SHAPE, neurons: int = NEURONS, *, mean: float = 0.0, seed: int = 0
) -> tuple[NDArray[np.float32], Float]:
    """Features with sd 1 and this mean, and responses that follow some of them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, *shape))
    y = 10 + 3 * rng.standard_normal((n, neurons)) + 4 * x.reshape(n, -1)[:, np.arange(neurons) % x[0].size]
    return (x + mean).astype(np.float32), y


def streamed(x: Any, y: Any, batches: Any = 64, **options: Any) -> FeatureMoments:
    """Moments of all images, `batches` at a time or cut at these places."""
    moments = FeatureMoments(x.shape[1:], y.shape[1], **options)
    cuts = range(batches, len(x), batches) if isinstance(batches, int) else batches
    for part in np.split(np.arange(len(x)), list(cuts)):
        moments.update(x[part], y[part])
    return moments


def two_passes(x: Any, y: Float, weights: Float | None = None) -> dict[str, Float]:
    """All views in float64, centred before anything is multiplied; [T, C, H, W]."""
    n, shape = len(x), x.shape[1:]
    w = np.ones(n) if weights is None else weights
    total = w.sum()
    f = np.asarray(x, np.float64).reshape(n, -1)
    f = f - w @ f / total
    r = y - w @ y / total
    cov = (w[:, None] * r).T @ f / total
    sd_f, sd_y = np.sqrt(w @ f**2 / total), np.sqrt(w @ r**2 / total)[:, None]
    cc = cov / sd_y / sd_f
    t = np.sqrt(total - 2) * cc / np.sqrt(1 - cc**2)
    views = {"covariance": cov, "covariance_z": cov / sd_y, "correlation": cc, "t": t}
    return {name: values.reshape(-1, *shape) for name, values in views.items()}


def assert_right(moments: FeatureMoments, x: Any, y: Float, *, tolerance: float = 2e-6, weights: Any = None) -> None:
    """Every view within this error of float64, in units of the correlation."""
    expected = two_passes(x, y, weights)
    n = moments.count
    sd_y = moments.response_sd[:, None, None, None].numpy()
    unit = {
        "covariance": sd_y * moments.feature_sd.numpy(),
        "covariance_z": moments.feature_sd.numpy(),
        "correlation": 1,
    }
    unit["t"] = np.sqrt(n) / (1 - expected["correlation"] ** 2) ** 1.5
    for name in VIEWS:
        values = getattr(moments, name)()
        assert values.dtype == torch.float32
        assert tuple(values.shape) == (moments.neurons, *moments.feature_shape)
        error = np.abs(values.double().numpy() - expected[name]) / unit[name]
        assert error.max() <= tolerance, (name, error.max())
    f = np.asarray(x, np.float64)
    if weights is None:
        np.testing.assert_allclose(moments.feature_mean.numpy(), f.mean(0), rtol=0, atol=1e-6 * f.std(0).max())
        np.testing.assert_allclose(moments.feature_sd.numpy(), f.std(0), rtol=2e-6)
        np.testing.assert_allclose(moments.response_mean.numpy(), y.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.response_sd.numpy(), y.std(0), rtol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 5), (17, 1, 1), (10, 10, 10)], ids=str)
@pytest.mark.parametrize("neurons", [1, 3, 7, 65])
def test_equals_two_passes_in_float64(shape: tuple[int, int, int], neurons: int):
    x, y = data(200, shape, neurons)
    assert_right(streamed(x, y, [1, 3, 66, 130]), x, y)


@pytest.mark.parametrize("mean", [1e3, 1e4, 1e5])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_means_far_above_the_deviations(mean: float, backend: str):
    """float32 features of mean 1e5 and sd 1 are multiples of 1/128; beyond that nothing is lost."""
    x, y = data(500, mean=mean)
    assert_right(streamed(x, y, backend=backend), x, y)


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_drift_between_batches(mean: float):
    """Mean and scale of the features change over the session by many standard deviations."""
    x, y = data(640, mean=mean)
    x += (np.linspace(0, 50, len(x)) ** 1.5)[:, None, None, None].astype(np.float32)
    y += np.linspace(0, 30, len(y))[:, None]
    assert_right(streamed(x, y), x, y)


def test_an_unrepresentative_first_batch():
    x, y = data(500)
    x[:3] += 3e4
    x[3:20] = 0
    for cuts in ([3, 20, 100], [20, 84], [1, 2, 3, 4, 5]):
        assert_right(streamed(x, y, cuts), x, y)


def test_an_outlier_first():
    x, y = data(500)
    x[0] = 1e6
    assert_right(streamed(x, y, 100), x, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_features(dtype: torch.dtype):
    x, y = data(mean=3.0)
    features = torch.from_numpy(x).to(dtype)
    assert_right(streamed(features, y), features.double().numpy(), y)


def state(moments: FeatureMoments) -> list[torch.Tensor]:
    s = moments._state
    return [torch.tensor(s.total), s.response_mean, s.response_m2, s.mean, s.m2, s.cross]


def assert_close(a: FeatureMoments, b: FeatureMoments) -> None:
    for name in VIEWS:
        torch.testing.assert_close(getattr(a, name)(), getattr(b, name)(), rtol=2e-5, atol=1e-5)
    assert a.count == b.count


def test_batches_in_any_order_and_of_any_size():
    x, y = data(300, mean=100.0)
    whole = streamed(x, y, 300)
    assert_close(streamed(x, y, 7), whole)
    order = np.random.default_rng(1).permutation(len(x))
    assert_close(streamed(x[order], y[order], 50), whole)


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_merging_equals_a_single_pass(mean: float):
    x, y = data(400, mean=mean)
    x[150:] += 5
    first, second, third = streamed(x[:150], y[:150]), streamed(x[150:250], y[150:250]), streamed(x[250:], y[250:])
    first.merge(second)
    first.merge(third)
    assert_right(first, x, y)
    empty = FeatureMoments(SHAPE, NEURONS)
    empty.merge(first)
    assert all(torch.equal(p, q) for p, q in zip(state(empty), state(first), strict=True))
    before = state(streamed(x[:150], y[:150]))
    nothing = streamed(x[:150], y[:150])
    nothing.merge(FeatureMoments(SHAPE, NEURONS))
    assert all(torch.equal(p, q) for p, q in zip(state(nothing), before, strict=True))


def test_merging_refuses_what_is_not_the_same():
    x, y = data(20)
    moments = streamed(x, y)
    with pytest.raises(ValueError, match=r"on features \[5, 4, 3\] cannot be merged with those of 4 on \[4, 4, 3\]"):
        moments.merge(FeatureMoments((4, 4, 3), NEURONS))
    with pytest.raises(ValueError, match="names differ"):
        moments.merge(FeatureMoments(SHAPE, NEURONS, names=list("abcd")))
    with pytest.raises(ValueError, match="with themselves"):
        moments.merge(moments)
    with pytest.raises(ValueError, match="one of them has 3 permutations, the other none"):
        moments.merge(FeatureMoments(SHAPE, NEURONS, permutations=3, responses=y))


def test_weights_are_repetitions():
    x, y = data(150)
    weights = np.random.default_rng(2).integers(0, 5, 150)
    weighted = FeatureMoments(SHAPE, NEURONS)
    for part in np.split(np.arange(150), [40, 41, 100]):
        weighted.update(x[part], y[part], weights[part])
    repeated = streamed(np.repeat(x, weights, 0), np.repeat(y, weights, 0))
    assert_close(weighted, repeated)
    assert_right(weighted, x, y, weights=weights.astype(float))


def test_images_of_weight_0_are_not_looked_at():
    x, y = data(50)
    x[3], x[48] = np.nan, np.inf
    weights = np.ones(50)
    weights[[3, 48]] = 0
    moments = FeatureMoments(SHAPE, NEURONS)
    moments.update(x, y, weights)
    keep = weights > 0
    assert_right(moments, x[keep], y[keep])
    moments.update(x, y, np.zeros(50))
    assert moments.count == 48
    assert moments.images == 100


@pytest.mark.parametrize("missing", ["error", "exclude"])
def test_trials_are_images_shown_again(missing: str):
    """[B, T, R] gives what showing the image once per trial gives: trial variance is in the response's variance."""
    x, y = data(80)
    rng = np.random.default_rng(3)
    trials = y[..., None] + 6 * rng.standard_normal((80, NEURONS, 5))
    shown = rng.random((80, 5)) < 0.7
    shown[:, 0] = True
    trials = np.where(shown[:, None], trials, np.nan)
    moments = streamed(x, trials, 30, missing=missing)
    image, trial = np.nonzero(shown)
    assert moments.count == len(image)
    assert_right(moments, x[image], trials[image, :, trial])
    averaged = FeatureMoments(SHAPE, NEURONS)
    averaged.update(x, np.nanmean(trials, axis=2), shown.sum(1))
    assert bool((averaged.response_sd < moments.response_sd).all())
    torch.testing.assert_close(averaged.covariance(), moments.covariance(), rtol=1e-4, atol=1e-5)
    strongest = averaged.correlation().abs() > 0.2
    assert bool((averaged.correlation().abs() > moments.correlation().abs())[strongest].all())


def test_trials_differ_between_neurons():
    x, y = data(10)
    trials = np.repeat(y[..., None], 3, axis=2)
    trials[4, 2, 1] = np.nan
    with pytest.raises(ValueError, match="image 4 has other trials for neuron 2 than for 0"):
        streamed(x, trials)
    moments = streamed(x, trials, missing="exclude")
    assert moments.excluded == [4]
    with pytest.raises(ValueError, match="the number of trials is the weight"):
        FeatureMoments(SHAPE, NEURONS).update(x, np.repeat(y[..., None], 3, axis=2), np.ones(10))


def test_missing_responses_are_refused_or_left_out_and_listed():
    x, y = data(100)
    y[70, 2] = y[12, 0] = y[12, 3] = np.nan
    names = [f"unit {i}" for i in range(NEURONS)]
    moments = FeatureMoments(SHAPE, NEURONS, names=names)
    moments.update(x[:10], y[:10])
    before = [tensor.clone() for tensor in state(moments)]
    with pytest.raises(ValueError, match=r'image 12 has no response of neuron unit 0 \(NaN\).*missing="exclude"'):
        moments.update(x[10:50], y[10:50])
    assert all(torch.equal(p, q) for p, q in zip(state(moments), before, strict=True))
    partial = streamed(x, y, 30, missing="exclude")
    keep = np.isfinite(y).all(1)
    assert partial.excluded == [12, 70]
    assert partial.count == 98
    assert partial.images == 100
    assert_right(partial, x[keep], y[keep])
    partial.merge(partial_copy := streamed(x, y, missing="exclude"))
    assert partial_copy.excluded == [12, 70]
    assert partial.excluded == [12, 70, 112, 170]
    y[12, 0] = -np.inf
    with pytest.raises(ValueError, match="got -inf for image 12, neuron 0"):
        streamed(x, y, missing="exclude")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_infinite_features_are_refused_and_named(value: float, dtype: torch.dtype):
    x, y = data(100)
    x[77, 2, 3, 1] = value
    features = torch.from_numpy(x).to(dtype)
    moments = FeatureMoments(SHAPE, NEURONS)
    moments.update(features[:70], y[:70])
    before = [tensor.clone() for tensor in state(moments)]
    with pytest.raises(ValueError, match=f"got {value} for image 77, channel 2, row 3, column 1"):
        moments.update(features[70:], y[70:])
    assert all(torch.equal(p, q) for p, q in zip(state(moments), before, strict=True))


def test_enormous_features():
    """Up to 1e17 they are as good as others; above, squares could overflow in float32."""
    x, y = data(200)
    big = x * np.float32(1e15)
    assert_right(streamed(big, y), big, y)
    x[13, 0, 1, 2] = 2e17
    with pytest.raises(
        ValueError, match=r"at most 1e\+17 in size, got 1.99\d*e\+17 for image 13, channel 0, row 1, column 2"
    ):
        streamed(x, y)


def test_dead_features_and_constant_responses_are_0_and_listed():
    x, y = data(200)
    x[:, 0] = 0
    x[:, 1, 2] = 0.1
    x[:, 2, 0, 0] = 1e5 + 1 / 3
    x[:, 3, 0, 0] = 1e-25 * x[:, 3, 0, 0]
    y[:, 1] = 0.1
    y[:, 3] = 0
    for moments in (streamed(x, y, 33), streamed(x, y, 33, backend="reference")):
        dead = moments.dead
        assert int(dead.sum()) == 12 + 3 + 1 + 1
        assert bool(dead[0].all())
        assert bool(dead[1, 2].all())
        assert moments.constant_responses == ["1", "3"]
        for name in VIEWS:
            values = getattr(moments, name)()
            assert bool(torch.isfinite(values).all())
            assert not bool(values[:, dead].any())
            if name != "covariance":
                assert not bool(values[[1, 3]].any())
        live = ~dead
        expected = two_passes(x[:, live.numpy()][:, :, None, None], y[:, [0, 2]])["correlation"][..., 0, 0]
        np.testing.assert_allclose(moments.correlation()[[0, 2]][:, live].numpy(), expected, atol=2e-6)


def test_correlations_are_at_most_1_and_t_is_finite():
    x, y = data(64, mean=1000.0)
    y[:, :NEURONS] = x.reshape(64, -1)[:, :NEURONS] * np.array([1.0, -3.0, 1e-3, 1e6])
    moments = streamed(x, y, 10)
    r = moments.correlation()
    assert float(r.abs().max()) <= 1
    best = r.flatten(1).diagonal()
    torch.testing.assert_close(best, torch.tensor([1.0, -1.0, 1.0, 1.0]), rtol=0, atol=1e-6)
    assert bool(torch.isfinite(moments.t()).all())


def test_the_largest_unclamped_correlation_is_within_rounding():
    for seed in range(5):
        x, y = data(40, (8, 5, 5), 5, mean=10.0 ** (seed - 1), seed=seed)
        y = x.reshape(40, -1)[:, :5].astype(np.float64)
        moments = streamed(x, y, 9)
        raw = moments._view(moments._inverse_sd(), moments._inverse_feature_sd())
        assert float(raw.abs().max()) <= 1 + 1e-6


def test_what_does_not_fit_is_refused():
    x, y = data(10)
    moments = FeatureMoments(SHAPE, NEURONS)
    with pytest.raises(ValueError, match="no images yet"):
        moments.correlation()
    with pytest.raises(ValueError, match=r"features should be \[B, 5, 4, 3\], got \[10, 5, 3, 4\]"):
        moments.update(x.transpose(0, 1, 3, 2), y)
    with pytest.raises(ValueError, match=r"responses should be \[10, 4\] .*got \[9, 4\]"):
        moments.update(x, y[:9])
    with pytest.raises(ValueError, match="responses are missing"):
        moments.update(x)
    with pytest.raises(TypeError, match="features should be a tensor or an array, got list"):
        moments.update([1.0], y)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"features should be float32, .* or float64, got"):
        moments.update(x.astype(np.int64), y)
    with pytest.raises(ValueError, match=r"weights should be \[10\], finite and at least 0"):
        moments.update(x, y, -np.ones(10))
    with pytest.raises(ValueError, match="only with permutations"):
        moments.update(x, y, rows=np.arange(10))
    moments.update(x[:0], y[:0])
    assert moments.count == moments.images == 0
    moments.update(x[:2], y[:2])
    with pytest.raises(ValueError, match="t needs a total weight above 2, got 2"):
        moments.t()
    with pytest.raises(ValueError, match="have no permutations"):
        moments.z()
    for wrong, message in (
        ({"feature_shape": (3, 4)}, "C, H, W"),
        ({"feature_shape": (0, 4, 4)}, "C, H, W"),
        ({"neurons": 0}, "neurons should be at least 1"),
        ({"names": ["a"]}, "a name for each of 4 neurons, got 1"),
        ({"missing": "skip"}, 'missing should be "error" or "exclude"'),
        ({"permutations": 1}, "0 or at least 2"),
        ({"permutations": 5}, "need `responses`"),
    ):
        arguments: dict[str, Any] = {"feature_shape": SHAPE, "neurons": NEURONS, **wrong}
        with pytest.raises(ValueError, match=message):
            FeatureMoments(**arguments)


def test_layouts_and_devices():
    x, y = data(30)
    strided = torch.from_numpy(x).to(memory_format=torch.channels_last)
    assert not strided.is_contiguous()
    a, b = streamed(strided, y), streamed(x, y)
    assert all(torch.equal(p, q) for p, q in zip(state(a), state(b), strict=True))
    assert a.to("cpu").device.type == "cpu"
    with pytest.raises(ValueError, match="features are on meta, these moments on cpu"):
        a.update(torch.zeros(1, *SHAPE, device="meta"), y[:1])


def test_bits_do_not_depend_on_threads(restore_threads: None):
    x, y = data(200, (16, 13, 11), 5)
    found = []
    for threads in (1, 2, 3):
        cl.set_num_threads(threads)
        found.append(state(streamed(x, y)))
    assert all(torch.equal(p, q) for p, q in zip(found[0], found[1], strict=True))
    assert all(torch.equal(p, q) for p, q in zip(found[0], found[2], strict=True))


# --- permutations -----------------------------------------------------------------------------------------------------


def test_permutations_equal_correlating_with_permuted_responses():
    x, y = data(120)
    moments = streamed(x, y, 50, permutations=20, seed=4, responses=y)
    assert moments.permutations == 20
    assert_right(moments, x, y)
    orders = moments._permutations.orders.numpy()  # type: ignore[union-attr]
    assert all(sorted(order) == list(range(120)) for order in orders)
    null = np.stack([two_passes(x, y[order])["correlation"] for order in orders])
    np.testing.assert_allclose(moments.null_mean().numpy(), null.mean(0), atol=2e-6)
    np.testing.assert_allclose(moments.null_sd().numpy(), null.std(0, ddof=1), atol=2e-6)
    expected = (two_passes(x, y)["correlation"] - null.mean(0)) / null.std(0, ddof=1)
    np.testing.assert_allclose(moments.z().numpy(), expected, rtol=1e-3, atol=1e-3)
    t = np.sqrt(118) * null / np.sqrt(1 - null**2)
    largest = np.abs(t).reshape(20, NEURONS, -1).max(2)
    np.testing.assert_allclose(moments.max_t_null().numpy(), largest, rtol=1e-5)
    ranked = np.sort(largest, axis=0)[::-1]
    np.testing.assert_allclose(moments.max_t_threshold(0.05).numpy(), ranked[0], rtol=1e-5)  # floor(0.05 * 21) = 1
    np.testing.assert_allclose(moments.max_t_threshold(0.2).numpy(), ranked[3], rtol=1e-5)


def test_permutations_know_the_true_features_from_chance():
    """With sd 1/sqrt(n - 1) for every feature, and responses that follow feature t strongly."""
    x, y = data(400)
    y[:, 3] = 2.0
    moments = streamed(x, y, permutations=40, responses=y)
    sd = moments.null_sd()
    assert abs(float(sd[:3].mean()) * 399**0.5 - 1) < 0.05
    z, t, bound = moments.z().flatten(1), moments.t().flatten(1), moments.max_t_threshold(0.1)
    for neuron in range(3):
        assert int(z[neuron].argmax()) == neuron
        assert float(z[neuron, neuron]) > 10
        assert float(t[neuron, neuron]) > float(bound[neuron]) > 2
    assert not bool(z[3].any())
    assert not bool(sd[3].any())
    assert bool(bound[3] == torch.inf)


def test_permutations_take_rows_in_any_order_once():
    x, y = data(60)
    whole = streamed(x, y, 60, permutations=6, seed=2, responses=y)
    parts = FeatureMoments(SHAPE, NEURONS, permutations=6, seed=2, responses=y)
    order = np.random.default_rng(0).permutation(60)
    for rows in np.split(order, [13, 40]):
        parts.update(x[rows], rows=rows)
    torch.testing.assert_close(parts.null_mean(), whole.null_mean(), rtol=0, atol=1e-6)
    for rows, message in (
        (np.array([5]), "every image should come once, got image 5 again"),
        (np.array([60]), r"rows should lie in 0..59"),
        (np.array([0.5]), "whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            parts.update(x[:1], rows=rows)
    again = FeatureMoments(SHAPE, NEURONS, permutations=6, seed=2, responses=y)
    with pytest.raises(ValueError, match="not those given to the constructor"):
        again.update(x[:5], y[5:10])
    workers = [FeatureMoments(SHAPE, NEURONS, permutations=6, seed=2, responses=y) for _ in range(2)]
    for worker, rows in zip(workers, (order[:25], order[25:]), strict=True):
        worker.update(x[rows], rows=rows)
    same = FeatureMoments(SHAPE, NEURONS, permutations=6, seed=2, responses=y)
    same.update(x[order[:1]], rows=order[:1])
    with pytest.raises(ValueError, match="different images"):
        workers[0].merge(same)
    workers[0].merge(workers[1])
    torch.testing.assert_close(workers[0].null_sd(), whole.null_sd(), rtol=0, atol=1e-6)


def test_permutations_state_their_memory():
    y = np.zeros((10, 64))
    with pytest.raises(
        ValueError, match=r"100 permutations of 64 neurons on 200704 features need 4.8 GiB, max_bytes is 4"
    ):
        FeatureMoments((1024, 14, 14), 64, permutations=100, responses=y, max_bytes=4 << 30)
    x, y = data(10)
    y[3, 1] = np.nan
    with pytest.raises(ValueError, match="got nan for image 3, neuron 1"):
        FeatureMoments(SHAPE, NEURONS, permutations=2, responses=y)
    few = streamed(x, data(10)[1], permutations=5, responses=data(10)[1])
    with pytest.raises(ValueError, match=r"alpha = 0.05 needs at least 19 permutations, these moments have 5"):
        few.max_t_threshold(0.05)


# --- sources and files ------------------------------------------------------------------------------------------------


def test_from_any_source():
    images = np.random.default_rng(0).integers(0, 256, (70, 6, 6, 3))
    _, y = data(70)
    shape = (3, 6, 6)

    def network(batch: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(batch)).permute(0, 3, 1, 2).float()

    class Source:
        def stream(self, images: Any) -> Any:
            return (network(images[i : i + 16]) for i in range(0, len(images), 16))

    whole = FeatureMoments(shape, NEURONS)
    whole.update(network(images), y)
    for source, given in ((Source(), images), (network, images), (Source().stream(images), None)):
        moments = FeatureMoments.from_source(source, given, y, batch=16, names=list("abcd"))
        assert moments.names == ("a", "b", "c", "d")
        assert_close(moments, whole)
    weights = np.arange(70.0)
    assert FeatureMoments.from_source(network, images, y, weights=weights).count == weights.sum()
    assert FeatureMoments.from_source(network, images, y, permutations=3).permutations == 3
    with pytest.raises(ValueError, match="the source gave 70 images, there are responses to 71"):
        FeatureMoments.from_source(network, images, np.concatenate([y, y[:1]]))
    with pytest.raises(ValueError, match="more images than the 69"):
        FeatureMoments.from_source(network, images, y[:69])
    with pytest.raises(TypeError, match="source should have `stream`"):
        FeatureMoments.from_source(7, images, y)


@pytest.mark.parametrize("permutations", [0, 4])
def test_files_hold_every_bit(tmp_path: Path, permutations: int):
    x, y = data(50)
    path = tmp_path / "moments.safetensors"
    options: dict[str, Any] = {"permutations": permutations, "responses": y if permutations else None}
    moments = streamed(x[:30], y[:30], names=["ä", "b", "c", "d"], missing="exclude", **options)
    moments.excluded.append(7)
    moments.save(path)
    loaded = FeatureMoments.load(path)
    assert all(torch.equal(p, q) for p, q in zip(state(loaded), state(moments), strict=True))
    for name in ("names", "feature_shape", "missing", "images", "excluded", "permutations"):
        assert getattr(loaded, name) == getattr(moments, name)
    for each in (moments, loaded):
        each.update(x[30:], y[30:])
    assert all(torch.equal(p, q) for p, q in zip(state(loaded), state(moments), strict=True))
    if permutations:
        assert torch.equal(loaded.z(), moments.z())
    moments.save(path)
    assert FeatureMoments.load(path).count == 50


def test_damaged_files_are_refused(tmp_path: Path):
    x, y = data(20)
    path = tmp_path / "moments.safetensors"
    streamed(x, y).save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole[:40], b"", whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"moments\.safetensors"):
            FeatureMoments.load(path)
    cl.io.save_arrays(path, "cortexloop-feature-moments-1", {"mean": np.zeros(3)}, {})
    with pytest.raises(ValueError, match="is damaged: 'sha256'"):
        FeatureMoments.load(path)
    cl.io.save_arrays(path, "something else", {"mean": np.zeros(3)}, {})
    with pytest.raises(ValueError, match="its format is 'something else'"):
        FeatureMoments.load(path)
    with pytest.raises(FileNotFoundError):
        FeatureMoments.load(tmp_path / "none")


def test_functional_form_checks_its_arguments():
    from cortexloop.functional import MomentState, feature_moments_update

    x, y = torch.zeros(3, 8), torch.zeros(3, 2)
    empty = MomentState.empty(2, 8)
    for arguments, message in (
        ((x, y[:2], empty), r"responses should be \[B, T\] with the B = 3 images"),
        ((x, torch.zeros(3, 5), empty), "responses should be of 2 neurons"),
        ((x, y, empty, torch.ones(2)), r"weights should be \[3\]"),
        ((x, y, empty, torch.zeros(3)), "not all 0"),
        ((x, y, empty, torch.tensor([1.0, -1, 1])), "at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            feature_moments_update(*arguments)
    assert empty.total == 0

"""CompactModel: hand-worked cases, an independent computation in NumPy, training, and errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from cortexloop.models import CompactModel
from cortexloop.weights import CompactWeights, LayerWeights


def layer(stride=1, epsilon=1e-3, channels=1, **changes) -> LayerWeights:
    """A layer whose batch normalisation is the identity (variance + epsilon = 1) unless changed."""
    arrays = {
        "bias": np.zeros(channels),
        "gamma": np.ones(channels),
        "beta": np.zeros(channels),
        "mean": np.zeros(channels),
        "variance": np.full(channels, 1 - epsilon),
    }
    return LayerWeights(stride=stride, epsilon=epsilon, **{**arrays, **changes})


def shuffled(model: CompactModel, seed: int) -> CompactModel:
    """The model with batch-norm statistics and biases that are not at their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.1)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    return model


def by_hand(w: CompactWeights, images: np.ndarray) -> np.ndarray:
    """Responses in float64, each convolution as a sum over its window, padding after TensorFlow's rule."""

    def windows(maps: np.ndarray, k: int, s: int) -> np.ndarray:
        pads = []
        for n in maps.shape[1:3]:
            total = max((-(-n // s) - 1) * s + k - n, 0)
            pads.append((total // 2, total - total // 2))
        padded = np.pad(maps, ((0, 0), *pads, (0, 0)))
        return sliding_window_view(padded, (k, k), axis=(1, 2))[:, ::s, ::s]  # [B, h, w, C, k, k]

    maps = images.astype(np.float64)
    for one in w.layers:
        view = windows(maps, one.kernel_size, one.stride)
        if one.kernel is not None:
            maps = np.einsum("bhwcij,ijco->bhwo", view, one.kernel.astype(np.float64))
        else:
            maps = np.einsum("bhwcij,ijc->bhwc", view, one.depthwise.astype(np.float64)) @ one.pointwise
        scale = one.gamma / np.sqrt(one.variance.astype(np.float64) + one.epsilon)
        maps = np.maximum((maps + one.bias - one.mean) * scale + one.beta, 0)
    return np.einsum("bhwc,hwc->b", maps, w.readout) + w.readout_bias


# --- worked by hand -------------------------------------------------------------------------------------------------


def test_a_one_pixel_model():
    # 2 r + 3 g + 5 b + 1 = 24 for the image (1, 2, 3); (24 - 4) / sqrt(3 + 1) * 6 + 7 = 67; readout 10 * 67 + 0.5
    weights = CompactWeights(
        "hand",
        (
            layer(
                epsilon=1.0,
                kernel=np.array([2.0, 3.0, 5.0]).reshape(1, 1, 3, 1),
                bias=np.array([1.0]),
                mean=np.array([4.0]),
                variance=np.array([3.0]),
                gamma=np.array([6.0]),
                beta=np.array([7.0]),
            ),
        ),
        np.full((1, 1, 1), 10.0),
        0.5,
        1,
        1,
    )
    model = CompactModel.from_weights(weights)
    assert model(torch.tensor([[[[1.0, 2.0, 3.0]]], [[[-100.0, 0.0, 0.0]]]]).double()).tolist() == [670.5, 0.5]


def corner_taps(n: int, k: int, stride: int) -> list[float]:
    """Which image column the leftmost kernel tap sees at each output column; nan where it sees padding."""
    kernel = np.zeros((k, k, 3, 1))
    kernel[k // 2, 0, 0, 0] = 1
    out = -(-n // stride)
    readout = np.zeros((1, out, 1))
    image = torch.zeros(1, 1, n, 3, dtype=torch.float64)
    image[0, 0, :, 0] = torch.arange(1, n + 1)
    seen = []
    for x in range(out):
        readout[:] = 0
        readout[0, x, 0] = 1
        w = CompactWeights("taps", (layer(stride, kernel=kernel),), readout.copy(), 0.0, 1, n)
        seen.append(CompactModel.from_weights(w)(image).item())
    return [value if value else float("nan") for value in seen]


@pytest.mark.parametrize(
    ("n", "k", "stride", "columns"),
    [
        (6, 5, 1, [None, None, 1, 2, 3, 4]),  # 2 zeros before
        (6, 5, 2, [None, 2, 4]),  # total 3: 1 before, 2 after
        (7, 5, 2, [None, 1, 3, 5]),  # total 4: 2 before
        (6, 3, 2, [1, 3, 5]),  # total 1: none before, 1 after
        (7, 3, 2, [None, 2, 4, 6]),  # total 2: 1 before
        (6, 7, 2, [None, 1, 3]),  # total 5: 2 before
        (6, 1, 2, [1, 3, 5]),  # the stride skips pixels, nothing is padded
        (1, 7, 2, [None]),
    ],
)
def test_same_padding_is_tensorflows(n, k, stride, columns):
    expected = [float("nan") if column is None else float(column) for column in columns]
    np.testing.assert_array_equal(corner_taps(n, k, stride), expected)


def test_kernels_are_not_flipped_and_padding_is_zero_after_the_relu():
    # The second layer reads the neighbour at its left; at column 0 that is padding: 0, and not ReLU(beta).
    first = layer(kernel=np.zeros((1, 1, 3, 1)), beta=np.array([4.0]))
    depthwise = np.zeros((3, 3, 1))
    depthwise[1, 0, 0] = 1
    second = layer(depthwise=depthwise, pointwise=np.ones((1, 1)))
    w = CompactWeights("pad", (first, second), np.array([[[1.0], [10.0], [100.0]]]), 0.0, 1, 3)
    assert CompactModel.from_weights(w)(torch.zeros(1, 1, 3, 3).double()).item() == 440.0


def test_relu_has_derivative_zero_at_zero():
    w = CompactWeights("kink", (layer(kernel=np.ones((1, 1, 3, 1))),), np.ones((1, 1, 1)), 0.0, 1, 1)
    image = torch.zeros(1, 1, 1, 3, dtype=torch.float64, requires_grad=True)
    CompactModel.from_weights(w)(image).sum().backward()
    assert image.grad.abs().max() == 0


# --- against the independent computation ----------------------------------------------------------------------------


@st.composite
def models(draw):
    depth = draw(st.integers(1, 4))

    def each(strategy):
        return draw(st.lists(strategy, min_size=depth, max_size=depth))

    seed = draw(st.integers(0, 2**31))
    model = CompactModel(
        each(st.integers(1, 6)),
        each(st.sampled_from((1, 3, 5, 7))),
        each(st.sampled_from((1, 2))),
        draw(st.integers(1, 19)),
        draw(st.integers(1, 19)),
        epsilons=each(st.sampled_from((1e-3, 1e-5, 0.5))),
        generator=torch.Generator().manual_seed(seed),
    )
    return shuffled(model.double(), seed).eval(), seed


@settings(max_examples=80, deadline=None)
@given(models())
def test_any_architecture_agrees_with_numpy(case):
    model, seed = case
    weights = model.to_weights("m")
    images = np.random.default_rng(seed).uniform(-116, 155, (2, weights.height, weights.width, 3))
    expected = by_hand(weights, images)
    with torch.no_grad():
        got = model(torch.from_numpy(images)).numpy()
        again = CompactModel.from_weights(weights)(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())
    np.testing.assert_array_equal(again, got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_round_trip_bit_for_bit(dtype):
    model = CompactModel((3, 4), (5, 3), (1, 2), 11, 12, epsilons=(1e-3, 1e-4), generator=torch.Generator())
    first = shuffled(model.to(dtype), 1).to_weights("m")
    second = CompactModel.from_weights(first).to_weights("m")
    assert [one.epsilon for one in second.layers] == [1e-3, 1e-4]
    for a, b in zip(first.layers, second.layers, strict=True):
        for key in ("kernel", "depthwise", "pointwise", "bias", "gamma", "beta", "mean", "variance"):
            x, y = getattr(a, key), getattr(b, key)
            assert (x is None and y is None) or (x.dtype == y.dtype and x.tobytes() == y.tobytes())
    assert first.readout.tobytes() == second.readout.tobytes()
    assert first.readout_bias == second.readout_bias
    assert (second.height, second.width) == (11, 12)


def test_arrays_of_two_dtypes_give_a_model_of_the_wider():
    w = CompactModel((2, 3), 3, (1, 2), 6, 5, generator=torch.Generator().manual_seed(0)).to_weights("m")
    mixed = replace(w, readout=w.readout.astype(np.float64))
    image = torch.ones(1, 6, 5, 3, dtype=torch.float64)
    expected = CompactModel.from_weights(w).double()(image)
    torch.testing.assert_close(CompactModel.from_weights(mixed)(image), expected, rtol=0, atol=0)


def test_from_weights_accepts_read_only_arrays_and_copies_them():
    weights = CompactModel((2,), 3, (1,), 4, 4, generator=torch.Generator()).to_weights("m")
    weights.readout.flags.writeable = False
    before = weights.readout.copy()
    model = CompactModel.from_weights(weights)
    with torch.no_grad():
        model.readout.zero_()
    np.testing.assert_array_equal(weights.readout, before)


def test_intermediate_maps():
    model = shuffled(CompactModel((3, 4, 2), 3, (1, 2, 1), 9, 8, generator=torch.Generator()), 2).double().eval()
    images = torch.randn(2, 9, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, second = model.activity(images, 0), model.activity(images, 1)
    assert first.shape == (2, 9, 8, 3)
    assert second.shape == (2, 5, 4, 4)
    depthwise = model.depthwise_output(images, 1)
    assert depthwise.shape == (2, 5, 4, 3)
    one = model.to_weights("m").layers[1]
    mixed = depthwise.detach().numpy() @ one.pointwise + one.bias
    rebuilt = np.maximum((mixed - one.mean) * one.gamma / np.sqrt(one.variance + one.epsilon) + one.beta, 0)
    np.testing.assert_allclose(second.detach().numpy(), rebuilt, rtol=1e-12, atol=1e-12)
    last = model.activity(images, 2)
    response = torch.einsum("bhwc,hwc->b", last, model.readout) + model.readout_bias
    torch.testing.assert_close(response, model(images))
    for call, bad in ((model.activity, 3), (model.activity, -1), (model.depthwise_output, 0)):
        with pytest.raises(ValueError, match="layer should be in"):
            call(images, bad)


def test_gradient_by_central_differences():
    model = shuffled(CompactModel((3, 2), 3, (2, 1), 6, 5, generator=torch.Generator()), 3).double().eval()
    images = torch.randn(2, 6, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(model, (images.requires_grad_(),))


# --- training -------------------------------------------------------------------------------------------------------


def test_a_model_learns_and_batch_norm_uses_keras_momentum():
    generator = torch.Generator().manual_seed(0)
    model = CompactModel((4, 3), 3, (1, 2), 8, 8, generator=generator).train()
    images = torch.randn(32, 8, 8, 3, generator=generator) * 50
    target = images.mean((1, 2, 3)) / images.mean((1, 2, 3)).std()
    norm = model.trunk.stack()[0].norm
    first = model.trunk.stack()[0].convolution
    with torch.no_grad():
        expected = 0.01 * first(torch.nn.functional.pad(images.permute(0, 3, 1, 2), (1, 1, 1, 1))).mean((0, 2, 3))
        model(images)
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(images) - target).square().mean()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    model.eval().to_weights("trained")


def test_fresh_parameters_are_keras_defaults():
    model = CompactModel((100,) * 5, generator=torch.Generator().manual_seed(0))
    assert sum(p.numel() for p in model.parameters()) + 2 * 500 == 138_401  # the unpruned published model
    weights = model.to_weights("fresh")
    bounds = [(weights.layers[0].kernel, 25 * 3, 25 * 100), (weights.readout, 28 * 28 * 100, 1)]
    bounds += [(one.depthwise, 25 * 100, 25) for one in weights.layers[1:]]
    bounds += [(one.pointwise, 100, 100) for one in weights.layers[1:]]
    for values, fan_in, fan_out in bounds:
        bound = np.sqrt(6 / (fan_in + fan_out))
        assert np.abs(values).max() <= bound
        assert np.abs(values).max() > 0.98 * bound
        assert abs(values.mean()) < 0.1 * bound
    for one in weights.layers:
        assert one.epsilon == 1e-3
        for value, expected in ((one.bias, 0), (one.gamma, 1), (one.beta, 0), (one.mean, 0), (one.variance, 1)):
            assert np.all(value == expected)
    assert weights.readout_bias == 0
    assert [one.stride for one in weights.layers] == [1, 2, 2, 1, 1]
    same = CompactModel((100,) * 5, generator=torch.Generator().manual_seed(0)).to_weights("same")
    np.testing.assert_array_equal(same.readout, weights.readout)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filters": (3, 3)}, "strides must be given"),
        ({"filters": ()}, "strides must be given"),
        ({"filters": (), "strides": ()}, "filters should be"),
        ({"filters": (0,), "strides": (1,)}, "filters should be"),
        ({"filters": (3,), "strides": (3,)}, "strides should be among"),
        ({"filters": (3,), "strides": (1, 1)}, "strides should have one entry"),
        ({"filters": (3,), "strides": (1,), "kernel_sizes": 4}, "kernel sizes should be among"),
        ({"filters": (3,), "strides": (1,), "epsilons": 0.0}, "epsilons should be positive"),
        ({"filters": (3,), "strides": (1,), "height": 0}, "input size"),
        ({"filters": (3,), "strides": (1,), "image_mean": (1.0,)}, "image_mean"),
    ],
)
def test_impossible_architectures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CompactModel(**arguments)


def test_wrong_images_are_refused():
    model = CompactModel((2,), 3, (1,), 6, 5)
    for shape in ((1, 5, 6, 3), (1, 3, 6, 5), (6, 5, 3), (1, 6, 5, 1)):
        with pytest.raises(ValueError, match=r"images should be \[B, 6, 5, 3\]"):
            model(torch.zeros(shape))
    with pytest.raises(TypeError, match=r"torch\.float32 as the model's parameters are, got torch\.float64"):
        model(torch.zeros(1, 6, 5, 3, dtype=torch.float64))
    assert model.eval()(torch.zeros(0, 6, 5, 3)).shape == (0,)


def test_models_that_diverged_are_not_exported():
    model = CompactModel((2,), 3, (1,), 6, 5)
    with torch.no_grad():
        model.readout[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="model 'm': readout should be finite"):
        model.to_weights("m")

"""Folding and packing: what lies where in the buffer."""

from __future__ import annotations

import numpy as np
import pytest

from cortexloop.packing import (
    WINOGRAD_ACROSS,
    WINOGRAD_ALONG,
    LayerField,
    ModelField,
    fold,
    layer_fields,
    pack,
    padded,
    to_bfloat16_bits,
    winograd_matrix,
)
from cortexloop.testing import CASES, random_inputs


def test_fold_is_batch_norm(rng: np.random.Generator) -> None:
    for layer in random_inputs(CASES[8]).bank.models[0].layers[1:]:
        assert layer.pointwise is not None
        x = rng.standard_normal(layer.in_channels)
        mixing, bias = fold(layer)
        plain = x @ layer.pointwise.astype(np.float64) + layer.bias
        normed = layer.gamma * (plain - layer.mean) / np.sqrt(layer.variance + layer.epsilon) + layer.beta
        np.testing.assert_allclose(x @ mixing + bias, normed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [CASES[5], CASES[11], CASES[12]], ids=str)
def test_sections_hold_the_folded_weights(case: object) -> None:
    models = random_inputs(case).bank.models  # type: ignore[arg-type]
    buffer, table = pack(models)
    f = LayerField
    for row, model in zip(table, models, strict=True):
        assert row[ModelField.DEPTH] == len(model.layers)
        assert (row[ModelField.HEIGHT], row[ModelField.WIDTH]) == (model.height, model.width)
        for index, layer in enumerate(model.layers):
            fields = layer_fields(row, index)
            k, c, o = layer.kernel_size, layer.in_channels, layer.out_channels
            mixing, bias = fold(layer)

            def section(field: LayerField, *shape: int, at: dict[LayerField, int] = fields) -> np.ndarray:
                offset = at[field]
                assert offset % 16 == 0
                return buffer[offset : offset + int(np.prod(shape))].reshape(shape)

            got = section(f.BIAS, padded(o))
            assert np.array_equal(got[:o], bias.astype(np.float32))
            assert not got[o:].any()
            if index == 0:
                full = section(f.SPATIAL, k, k, 3, padded(o))
                assert np.array_equal(full[..., :o], mixing.astype(np.float32))
                assert not full[..., o:].any()
                if k == 5 and layer.stride == 1:
                    along, across = winograd_matrix(WINOGRAD_ALONG), winograd_matrix(WINOGRAD_ACROSS)
                    tiles = np.einsum("pj,qi,ijco->pqco", along, across, mixing)
                    assert np.array_equal(section(f.WINOGRAD, 8, 6, 3, padded(o))[..., :o], tiles.astype(np.float32))
                    columns = section(f.WINOGRAD_TRANSPOSED, 8, o, 16)
                    flipped = np.einsum("pj,ijco->poic", along, mixing[:, ::-1]).reshape(8, o, 15)
                    assert np.array_equal(columns[..., :15], flipped.astype(np.float32))
                    assert not columns[..., 15].any()
                    assert fields[f.TRANSPOSED] == -1
                else:
                    rows = section(f.TRANSPOSED, o, k, padded(3 * k))[..., : 3 * k].reshape(o, k, k, 3)
                    assert np.array_equal(rows, mixing.transpose(3, 0, 1, 2).astype(np.float32))
                    assert fields[f.WINOGRAD] == fields[f.WINOGRAD_TRANSPOSED] == -1
            else:
                depthwise = section(f.SPATIAL, k, k, padded(c))
                assert layer.depthwise is not None
                assert np.array_equal(depthwise[..., :c], layer.depthwise)
                assert not depthwise[..., c:].any()
                assert np.array_equal(section(f.POINTWISE, c, padded(o))[:, :o], mixing.astype(np.float32))
                assert np.array_equal(section(f.TRANSPOSED, o, padded(c))[:, :c], mixing.T.astype(np.float32))
                assert fields[f.WINOGRAD] == -1
                pairs = section(f.PAIRS, (c + 1) // 2, padded(o)).view(np.uint16).reshape(-1, padded(o), 2)
                even = np.zeros((c + c % 2, padded(o)), np.float32)
                even[:c, :o] = mixing
                assert np.array_equal(pairs.transpose(0, 2, 1).reshape(even.shape), to_bfloat16_bits(even))
                assert (fields[f.PIXEL_PAIRS] >= 0) == (layer.stride == 2)
                if fields[f.PIXEL_PAIRS] >= 0:
                    slots = section(f.PIXEL_PAIRS, k, (k + 1) // 2, padded(c)).view(np.uint16)
                    taps = slots.reshape(k, -1, padded(c), 2).swapaxes(2, 3).reshape(k, k + 1, padded(c))[..., :c]
                    odd = fields[f.PAD_LEFT] % 2  # then the first pair starts one column before the first tap
                    assert np.array_equal(taps[:, odd : odd + k], to_bfloat16_bits(layer.depthwise))
                    assert not taps[:, 0 if odd else k].any()
        h, w = model.map_sizes()[-1]
        channels = model.filters[-1]
        start = row[ModelField.READOUT]
        readout = buffer[start : start + h * w * padded(channels)].reshape(h, w, -1)
        assert np.array_equal(readout[..., :channels], model.readout)
        assert buffer[row[ModelField.READOUT_BIAS]] == np.float32(model.readout_bias)


@pytest.mark.parametrize("points", [WINOGRAD_ALONG, WINOGRAD_ACROSS], ids=["along", "across"])
def test_winograd_matrix_computes_the_correlation(points: tuple[float, ...], rng: np.random.Generator) -> None:
    """y = A^T ((G w) * (B^T x)) with B^T from the interpolation polynomials and A^T from the powers of the points."""
    inputs, outputs = len(points), len(points) - 4
    finite = [p for p in points if np.isfinite(p)]
    b = np.zeros((inputs, inputs))
    a = np.zeros((outputs, inputs))
    for p, point in enumerate(points):
        coefficients = np.poly([q for q in finite if q != point])[::-1]
        b[p, : len(coefficients)] = coefficients
        a[:, p] = np.arange(outputs) == outputs - 1 if np.isinf(point) else [point**i for i in range(outputs)]
    w, x = rng.standard_normal(5), rng.standard_normal(inputs)
    got = a @ ((winograd_matrix(points) @ w) * (b @ x))
    np.testing.assert_allclose(got, [w @ x[i : i + 5] for i in range(outputs)], rtol=1e-10, atol=1e-10)


def test_multiples_of_1080_transform_to_short_binary_fractions() -> None:
    along, across = winograd_matrix(WINOGRAD_ALONG), winograd_matrix(WINOGRAD_ACROSS)
    scaled = 1080 * np.einsum("pj,qi->pqji", along, across) * 64
    np.testing.assert_allclose(scaled, np.rint(scaled), rtol=0, atol=1e-9)


def test_bfloat16_rounds_to_nearest_even() -> None:
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-9, 0.0, 3e38], np.float32)
    got = (to_bfloat16_bits(x).astype(np.uint32) << 16).view(np.float32)
    assert got[:6].tolist() == [1.0, 1.0, 1 + 2**-6, 1 + 2**-7, -1.0, 0.0]
    assert np.isfinite(got[6])

"""The public functions: what they accept, what they refuse and in which words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import cortexloop as cl
from cortexloop.models import CompactModel
from cortexloop.testing import Case, ModelShape, random_inputs


def test_numpy_in_numpy_out_torch_in_torch_out(small_bank: cl.ModelBank, small_images: torch.Tensor) -> None:
    from_torch = cl.responses(small_images, small_bank)
    from_numpy = cl.responses(small_images.numpy(), small_bank)
    assert isinstance(from_torch, torch.Tensor)
    assert isinstance(from_numpy, np.ndarray)
    assert from_numpy.dtype == np.float32
    assert from_numpy.shape == (4, 3)
    assert np.array_equal(from_numpy, from_torch.numpy())
    cotangent = np.ones((4, 3), np.float32)
    grad, values = cl.input_gradient(small_images.numpy(), small_bank, cotangent, return_responses=True)
    assert isinstance(grad, np.ndarray)
    assert grad.shape == (4, 17, 13, 3)
    assert np.array_equal(values, from_numpy)


def test_float64_is_computed_in_float64(small_bank: cl.ModelBank, small_images: torch.Tensor) -> None:
    images = cl.recenter(small_images.double(), small_bank.image_mean)
    got = cl.responses(images, small_bank, backend="reference")
    assert got.dtype == torch.float64
    with torch.no_grad():
        # float32 parameters, folded in float64 and rounded to float32: the only difference from the modules.
        modules = [CompactModel.from_weights(w).double() for w in small_bank.models]
        expected = torch.stack([m(images) for m in modules], dim=1)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    grad = cl.input_gradient(images, small_bank, torch.ones_like(got), backend="reference")
    assert grad.dtype == torch.float64


@pytest.mark.parametrize("kind", ["read-only", "strided", "reversed", "big-endian", "fortran"])
def test_numpy_arrays_of_any_memory_layout(small_bank: cl.ModelBank, small_images: torch.Tensor, kind: str) -> None:
    plain = cl.recenter(small_images.numpy())
    expected = cl.responses(plain, small_bank)
    array = plain.copy()
    if kind == "read-only":
        array.flags.writeable = False
    elif kind == "strided":
        array = np.repeat(plain, 2, axis=2)[:, :, ::2]
    elif kind == "reversed":
        array = plain[::-1].copy()[::-1]
    elif kind == "big-endian":
        array = plain.astype(">f4")
    elif kind == "fortran":
        array = np.asfortranarray(plain)
    assert np.array_equal(cl.responses(array, small_bank), expected)


def test_torch_tensors_that_are_not_contiguous(small_bank: cl.ModelBank, small_images: torch.Tensor) -> None:
    expected = cl.responses(small_images, small_bank)
    turned = small_images.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    assert not turned.is_contiguous()
    assert torch.equal(cl.responses(turned, small_bank), expected)


@pytest.mark.parametrize(
    "pairs",
    [
        [2, 0, 1, 2],
        (2, 0, 1, 2),
        np.array([2, 0, 1, 2]),
        np.array([2, 0, 1, 2], np.uint8),
        torch.tensor([2, 0, 1, 2]),
        torch.tensor([2, 0, 1, 2], dtype=torch.int16),
        np.array([2, 9, 0, 9, 1, 9, 2, 9])[::2],
    ],
    ids=["list", "tuple", "int64", "uint8", "torch", "torch-int16", "strided"],
)
def test_pairs_of_any_integer_kind(small_bank: cl.ModelBank, small_images: torch.Tensor, pairs: Any) -> None:
    whole = cl.responses(small_images, small_bank)
    got = cl.responses(small_images, small_bank, pairs=pairs)
    assert torch.equal(got, whole[torch.arange(4), torch.tensor([2, 0, 1, 2])])


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([0, 1, 2], ValueError, r"pairs should hold one model position per image, \[4\], got \[3\]"),
        ([[0, 1, 2, 0]], ValueError, r"got \[1, 4\]"),
        ([0, 1, 3, 0], ValueError, r"pairs should lie in 0\.\.2 .*got 3 for image 2"),
        ([0, -1, 1, 0], ValueError, "got -1 for image 1"),
        ([0.0, 1.0, 1.0, 0.0], TypeError, "pairs should be integers .*float64"),
        ([True, False, True, False], TypeError, "pairs should be integers .*bool"),
        (torch.tensor([0.0, 1, 1, 0]), TypeError, "pairs should be integers .*float32"),
        (["a", "b", "c", "d"], TypeError, "pairs should be integers"),
    ],
)
def test_wrong_pairs(
    small_bank: cl.ModelBank, small_images: torch.Tensor, pairs: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cl.responses(small_images, small_bank, pairs=pairs)


FLOATS = np.zeros((4, 17, 13, 3), np.float32)


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (FLOATS[0], {}, ValueError, r"got \[17, 13, 3\]; add a batch axis: images\[None\]"),
        (FLOATS[0, 0], {}, ValueError, r"images should be \[B, 17, 13, 3\] for layout 'NHWC', got \[13, 3\]"),
        (FLOATS, {"layout": "NCHW"}, ValueError, r'got \[4, 17, 13, 3\]; say layout="NHWC"'),
        (FLOATS.transpose(0, 3, 1, 2), {}, ValueError, r'got \[4, 3, 17, 13\]; say layout="NCHW"'),
        (
            np.zeros((4, 112, 112, 3), np.uint8),
            {},
            ValueError,
            "another input size: its models take 17 x 13 pixels.*112",
        ),
        (np.zeros((4, 3, 9, 9), np.uint8), {"layout": "NCHW"}, ValueError, "these images have 9 x 9"),
        (np.zeros((4, 17, 13, 1), np.uint8), {}, ValueError, r"expected three channels \(R, G, B\)"),
        (np.zeros((4, 17, 13, 4), np.uint8), {}, ValueError, r"expected three channels \(R, G, B\)"),
        (FLOATS, {"layout": "nhwc"}, ValueError, 'layout should be "NHWC" or "NCHW", got \'nhwc\''),
        (FLOATS, {"precision": "bf16"}, ValueError, 'precision should be "exact" or "fast", got \'bf16\''),
        (
            FLOATS,
            {"backend": "gpu"},
            ValueError,
            "backend should be one of 'auto', 'cpu', 'cuda', 'triton', 'reference', got 'gpu'",
        ),
        (FLOATS.astype(np.int64), {}, TypeError, r"got int64; convert pixels 0..255 with .astype\('uint8'\)"),
        (FLOATS.astype(np.uint16), {}, TypeError, "got uint16; convert pixels"),
        (FLOATS.astype(np.int8), {}, TypeError, "got int8; convert pixels"),
        (FLOATS.astype(np.float16), {}, TypeError, "got float16; convert to float32"),
        (FLOATS.astype(complex), {}, TypeError, "images should be uint8"),
        (FLOATS.astype(bool), {}, TypeError, "images should be uint8"),
        (FLOATS.astype(object), {}, TypeError, "images should be uint8"),
        (torch.zeros(4, 17, 13, 3, dtype=torch.int32), {}, TypeError, "got int32; convert pixels"),
        (torch.zeros(4, 17, 13, 3, dtype=torch.bfloat16), {}, TypeError, "got bfloat16; convert to float32"),
        (FLOATS.tolist(), {}, TypeError, "images should be a NumPy array or a torch tensor, got list"),
    ],
)
def test_wrong_images(
    small_bank: cl.ModelBank, images: Any, options: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cl.responses(images, small_bank, **options)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numpy_images_with_nan_are_named(small_bank: cl.ModelBank, value: float) -> None:
    images = FLOATS.copy()
    images[2, 5, 5, 1] = images[3, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"image 2 holds NaN or infinity \(2 of 4 images do\)"):
        cl.responses(images, small_bank)
    with pytest.raises(ValueError, match="image 2 holds NaN"):
        cl.input_gradient(images, small_bank, np.ones((4, 3), np.float32))


def test_raw_looking_floats_are_not_guessed(small_bank: cl.ModelBank, small_images: torch.Tensor) -> None:
    """Float images are recentred values, even if they look like pixels."""
    raw = small_images.float()
    assert not torch.equal(cl.responses(raw, small_bank), cl.responses(small_images, small_bank))


def test_bank_and_images_on_one_device(small_bank: cl.ModelBank) -> None:
    with pytest.raises(ValueError, match=r"images are on meta, the bank is on cpu; .*bank.to\('meta'\)"):
        cl.responses(torch.zeros(1, 17, 13, 3, device="meta"), small_bank)


@pytest.mark.parametrize(
    ("cotangent", "error", "message"),
    [
        (np.ones((3, 4), np.float32), ValueError, r"cotangent should be \[4, 3\] .*got \[3, 4\]"),
        (np.ones(4, np.float32), ValueError, r"cotangent should be \[4, 3\]"),
        (np.ones((4, 3)), TypeError, "cotangent should have the dtype of the responses, float32, got float64"),
        (np.ones((4, 3), int), TypeError, "got int64"),
        (torch.ones(4, 3), TypeError, "both be NumPy arrays or both torch tensors, got ndarray and Tensor"),
        ([[1.0]], TypeError, "cotangent should be a NumPy array or a torch tensor, got list"),
    ],
)
def test_wrong_cotangents(small_bank: cl.ModelBank, cotangent: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cl.input_gradient(FLOATS, small_bank, cotangent)


def test_cotangents_that_are_not_contiguous(small_bank: cl.ModelBank, small_images: torch.Tensor) -> None:
    cotangent = torch.arange(12, dtype=torch.float32).view(3, 4).T
    expected = cl.input_gradient(small_images, small_bank, cotangent.contiguous())
    assert torch.equal(cl.input_gradient(small_images, small_bank, cotangent), expected)
    for_pairs = cl.input_gradient(small_images, small_bank, cotangent[:, 0], pairs=[0, 1, 2, 0])
    assert for_pairs.shape == expected.shape
    with pytest.raises(ValueError, match=r"cotangent should be \[4\] \(\[B\], one number per pair\)"):
        cl.input_gradient(small_images, small_bank, cotangent, pairs=[0, 1, 2, 0])


def test_input_gradient_is_a_constant(small_bank: cl.ModelBank, small_images: torch.Tensor) -> None:
    leaf = cl.recenter(small_images).requires_grad_()
    assert not cl.input_gradient(leaf, small_bank, torch.ones(4, 3)).requires_grad


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_activations_match_the_modules(small_bank: cl.ModelBank, small_images: torch.Tensor, layout: str) -> None:
    bank = small_bank.select([0, 2])
    x = cl.recenter(small_images)
    given = x if layout == "NHWC" else x.permute(0, 3, 1, 2)
    modules = [CompactModel.from_weights(w) for w in bank.models]
    with torch.no_grad():
        for layer in (0, 1):
            for got, module in zip(cl.activations(given, bank, layer, layout=layout), modules, strict=True):
                expected = module.activity(x, layer)
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
        for got, module in zip(cl.activations(given, bank, 1, kind="depthwise", layout=layout), modules, strict=True):
            torch.testing.assert_close(got, module.depthwise_output(x, 1), rtol=1e-5, atol=1e-4)


def test_activations_shapes_and_kinds(small_bank: cl.ModelBank, small_images: torch.Tensor) -> None:
    maps = cl.activations(small_images.numpy(), small_bank, 0)
    assert [m.shape for m in maps] == [(4, 17, 13, 5), (4, 9, 7, 3), (4, 17, 13, 4)]
    assert all(isinstance(m, np.ndarray) and (m >= 0).all() for m in maps)
    depthwise = cl.activations(small_images[:0], small_bank.select([0, 2]), 1, kind="depthwise")
    assert [tuple(m.shape) for m in depthwise] == [(0, 9, 7, 5), (0, 9, 7, 4)]


@pytest.mark.parametrize(
    ("layer", "kind", "message"),
    [
        (0, "depthwise", "layer 0 is a full convolution without a depthwise part"),
        (1, "activity", r"model 'model1' has 1 layers \(0..0\), layer 1 was asked for"),
        (-1, "activity", "layer should be 0 or more"),
        (0, "gradient", 'kind should be "activity" or "depthwise", got \'gradient\''),
    ],
)
def test_wrong_activations(small_bank: cl.ModelBank, layer: int, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cl.activations(FLOATS, small_bank, layer, kind=kind)


def test_the_last_activity_times_the_readout_is_the_response(small_images: torch.Tensor) -> None:
    bank = random_inputs(Case("one", 1, 17, 13, (ModelShape((5, 7), (5, 3), (1, 2)),))).bank
    model = bank.models[0]
    last = cl.activations(small_images, bank, 1)[0]
    by_hand = (last.double() * torch.from_numpy(model.readout).double()).sum(dim=(1, 2, 3)) + model.readout_bias
    torch.testing.assert_close(cl.responses(small_images, bank)[:, 0].double(), by_hand, rtol=0, atol=2e-6)

"""The derivative of a model's last map, for many cotangents of each image."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

import cortexloop as cl
from cortexloop import functional, ops
from cortexloop.functional.pullback import _as_readouts
from cortexloop.packing import padded
from cortexloop.testing import CASES, Case, assert_matches_reference, exact_inputs, random_inputs, without_kinks

K = 3
ONE_MODEL = [case for case in CASES if len(case.models) == 1]


def integers(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(1)).float()


def cotangent_shape(bank: cl.ModelBank, batch: int) -> tuple[int, ...]:
    weights = bank.models[0]
    return (batch, K, *weights.map_sizes()[-1], weights.filters[-1])


def by_readouts(images: Tensor, bank: cl.ModelBank, cotangents: Tensor, backend: str) -> Tensor:
    """Each cotangent as the readout of a model of its own, by the operator that the bank has anyway."""
    out = []
    for image, rows in zip(images, cotangents, strict=True):
        models = [dataclasses.replace(bank.models[0], name=f"k{k}", readout=row.numpy()) for k, row in enumerate(rows)]
        shown = image.expand(K, *image.shape).contiguous()
        out.append(
            functional.input_gradient(shown, cl.ModelBank(models), torch.ones(K), pairs=range(K), backend=backend)
        )
    return torch.stack(out)


@pytest.mark.parametrize("case", ONE_MODEL, ids=str)
def test_bits_are_those_of_the_gradient_with_that_readout(engine: str, case: Case) -> None:
    inputs = random_inputs(case)
    cotangents = torch.randn(
        cotangent_shape(inputs.bank, len(inputs.images)), generator=torch.Generator().manual_seed(2)
    )
    result = functional.pullback(inputs.images, inputs.bank, cotangents, backend=engine)
    expected = by_readouts(inputs.images, inputs.bank, cotangents, engine)
    if engine == "reference":  # which convolves all cotangents of an image together
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    else:
        assert torch.equal(result, expected)


@pytest.mark.parametrize("case", ONE_MODEL, ids=str)
def test_exact(engine: str, case: Case) -> None:
    """Small integers: the reference in float64 gives the same numbers."""
    inputs = exact_inputs(case)
    channels = inputs.bank.models[0].filters[-1]
    readout = torch.from_numpy(inputs.bank.models[0].readout)
    # multiples of the readout that `exact_inputs` has proved not to round
    cotangents = torch.stack([readout * factor for factor in (1, -1, 0)])[None].repeat(len(inputs.images), 1, 1, 1, 1)
    assert cotangents.shape[-1] == channels
    result = functional.pullback(inputs.images_uint8, inputs.bank, cotangents, backend=engine)
    exact = functional.pullback(inputs.images.double(), inputs.bank, cotangents.double(), backend="reference")
    assert torch.equal(result.double(), exact)


def test_close(engine: str) -> None:
    inputs = random_inputs(Case("28x28", 6, 28, 28, CASES[-3].models))
    clear = without_kinks(inputs)
    assert clear.any()
    images = inputs.images[clear]
    cotangents = torch.randn(cotangent_shape(inputs.bank, len(images)), generator=torch.Generator().manual_seed(2))
    exact = functional.pullback(images.double(), inputs.bank, cotangents.double(), backend="reference")
    torch32 = functional.pullback(images, inputs.bank, cotangents, backend="reference")
    actual = functional.pullback(images, inputs.bank, cotangents, backend=engine)
    assert_matches_reference(actual, torch32, exact, factor=2.0)


def test_layouts_and_dtypes_agree(engine: str, small_bank: cl.ModelBank, small_images: Tensor) -> None:
    bank = small_bank.select(2)
    cotangents = integers(cotangent_shape(bank, 4))
    result = functional.pullback(small_images, bank, cotangents, backend=engine)
    floats = functional.pullback(cl.recenter(small_images), bank, cotangents, backend=engine)
    assert torch.equal(result, floats)
    first = small_images.permute(0, 3, 1, 2).contiguous()
    swapped = functional.pullback(first, bank, cotangents, layout="NCHW", backend=engine)
    assert torch.equal(swapped.permute(0, 1, 3, 4, 2), result)


def test_threads_and_neighbours_change_nothing(
    kernels: None, restore_threads: None, small_bank: cl.ModelBank, small_images: Tensor
) -> None:
    bank = small_bank.select(0)
    cotangents = torch.randn(cotangent_shape(bank, 4), generator=torch.Generator().manual_seed(2))
    cl.set_num_threads(1)
    whole = functional.pullback(small_images, bank, cotangents)
    cl.set_num_threads(2)
    assert torch.equal(functional.pullback(small_images, bank, cotangents), whole)
    for i in range(4):
        for k in range(K):
            alone = functional.pullback(small_images[i : i + 1], bank, cotangents[i : i + 1, k : k + 1].contiguous())
            assert torch.equal(alone[0, 0], whole[i, k])


def test_the_same_as_readouts_that_share_their_layers(small_bank: cl.ModelBank, small_images: Tensor) -> None:
    """How GPUs do it."""
    bank = small_bank.select(2)
    cotangents = torch.randn(cotangent_shape(bank, 4), generator=torch.Generator().manual_seed(2))
    channels = bank.models[0].filters[-1]
    whole = torch.nn.functional.pad(cotangents, (0, padded(channels) - channels))
    result = _as_readouts(small_images, bank, whole, "NHWC")
    torch.testing.assert_close(result, functional.pullback(small_images, bank, cotangents), rtol=1e-5, atol=1e-7)


def test_opcheck(engine: str, small_bank: cl.ModelBank, small_images: Tensor) -> None:
    bank = small_bank.select(0)
    weights = bank.models[0]
    shape = (4, K, *weights.map_sizes()[-1], padded(weights.filters[-1]))
    torch.library.opcheck(ops.bank_pullback, (small_images, bank.weights, bank.table, integers(shape), "NHWC", engine))
    leaf = small_images.float().requires_grad_()
    result = ops.bank_pullback(leaf, bank.weights, bank.table, integers(shape), "NHWC", engine)
    with pytest.raises(NotImplementedError, match="no derivative"):
        result.sum().backward()


def test_nothing_to_do(engine: str, small_bank: cl.ModelBank, small_images: Tensor) -> None:
    bank = small_bank.select(0)
    none = functional.pullback(small_images, bank, integers(cotangent_shape(bank, 4))[:, :0], backend=engine)
    assert none.shape == (4, 0, 17, 13, 3)
    none = functional.pullback(small_images[:0], bank, integers(cotangent_shape(bank, 0)), backend=engine)
    assert none.shape == (0, K, 17, 13, 3)


def test_bad_arguments(small_bank: cl.ModelBank, small_images: Tensor) -> None:
    bank = small_bank.select(0)
    cotangents = integers(cotangent_shape(bank, 4))
    with pytest.raises(ValueError, match="select one of the bank's 3"):
        functional.pullback(small_images, small_bank, cotangents)
    with pytest.raises(ValueError, match=r"cotangents should be \[4, K, 9, 7, 7\]"):
        functional.pullback(small_images, bank, cotangents[..., 1:])
    with pytest.raises(TypeError, match="float32"):
        functional.pullback(small_images, bank, cotangents.double())
    with pytest.raises(TypeError, match="torch tensor"):
        functional.pullback(small_images, bank, np.zeros(cotangents.shape, np.float32))
    for change in ({"table": small_bank.table}, {"cotangents": cotangents}, {"layout": "HWC"}):
        whole = {
            "images": small_images, "weights": bank.weights, "table": bank.table,
            "cotangents": torch.zeros(4, K, 9, 7, 16), "layout": "NHWC", "backend": "auto",
        }  # fmt: skip
        with pytest.raises(ValueError, match=r"one model|cotangents should be|layout should be"):
            ops.bank_pullback(**{**whole, **change})

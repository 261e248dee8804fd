"""`ModelBank`: frozen, selected, moved, built from modules."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cortexloop as cl
from cortexloop.models import CompactModel
from cortexloop.testing import CASES, Case, ModelShape, random_inputs


def test_attributes(small_bank: cl.ModelBank) -> None:
    assert len(small_bank) == 3
    assert tuple(small_bank) == small_bank.names == ("model0", "model1", "model2")
    assert (small_bank.height, small_bank.width) == (17, 13)
    assert small_bank.image_mean == cl.IMAGE_MEAN
    assert small_bank.device == torch.device("cpu")
    assert repr(small_bank).startswith("ModelBank(3 models of 17 x 13 images, ")


def test_frozen(small_bank: cl.ModelBank) -> None:
    with pytest.raises(AttributeError, match="frozen"):
        small_bank.names = ("a",)


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        (1, ("model1",)),
        (np.int64(-1), ("model2",)),
        ("model2", ("model2",)),
        ([2, 0], ("model2", "model0")),
        (("model1", "model0"), ("model1", "model0")),
        (slice(1, None), ("model1", "model2")),
        (slice(None, None, -1), ("model2", "model1", "model0")),
        (np.array([True, False, True]), ("model0", "model2")),
        ([False, True, False], ("model1",)),
        (np.array(["model0"]), ("model0",)),
    ],
)
def test_select(small_bank: cl.ModelBank, small_images: torch.Tensor, which: Any, expected: tuple[str, ...]) -> None:
    chosen = small_bank.select(which)
    assert chosen.names == expected
    columns = [small_bank.names.index(name) for name in expected]
    assert torch.equal(cl.responses(small_images, chosen), cl.responses(small_images, small_bank)[:, columns])


@pytest.mark.parametrize(
    ("which", "error", "message"),
    [
        ([], ValueError, "the selection is empty"),
        (slice(3, None), ValueError, "the selection is empty"),
        (3, IndexError, "position 3 is outside the bank of 3 models"),
        ([0, -4], IndexError, "position -4 is outside"),
        ("nobody", ValueError, "no model named 'nobody'"),
        ([True, False], ValueError, r"one entry per model \(3\), got 2"),
        ([0.5], ValueError, "expected positions .* got float64"),
        ([[0, 1]], ValueError, r"got an array of shape \(1, 2\)"),
        ([0, 0], ValueError, "must be unique, these occur more than once: model0"),
    ],
)
def test_wrong_selections(small_bank: cl.ModelBank, which: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_bank.select(which)


def test_from_modules(small_bank: cl.ModelBank, small_images: torch.Tensor) -> None:
    modules = [CompactModel.from_weights(w) for w in small_bank.models]
    bank = cl.ModelBank.from_modules(modules, names=small_bank.names)
    assert bank.names == small_bank.names
    assert torch.equal(bank.weights, small_bank.weights)
    assert torch.equal(bank.table, small_bank.table)
    assert cl.ModelBank.from_modules(modules[:1]).names == ("model0",)
    with pytest.raises(ValueError, match=r"expected one name per module \(3\), got 2"):
        cl.ModelBank.from_modules(modules, names=["a", "b"])
    before = cl.responses(small_images, bank)
    with torch.no_grad():
        for parameter in modules[0].parameters():
            parameter.zero_()
    assert torch.equal(cl.responses(small_images, bank), before)


def test_save_and_load_are_bit_exact(small_bank: cl.ModelBank, tmp_path: Path) -> None:
    small_bank.save(tmp_path / "bank.safetensors")
    loaded = cl.ModelBank.load(tmp_path / "bank.safetensors")
    assert loaded.names == small_bank.names
    assert torch.equal(loaded.weights, small_bank.weights)
    assert torch.equal(loaded.table, small_bank.table)
    assert cl.ModelBank.load(tmp_path / "bank.safetensors", names=["model2"]).names == ("model2",)


def test_models_of_one_bank_take_the_same_images(small_bank: cl.ModelBank) -> None:
    other = random_inputs(Case("other", 1, 9, 9, (ModelShape((2,), (3,), (1,)),))).bank.models[0]
    other = dataclasses.replace(other, name="other")
    with pytest.raises(ValueError, match="'model0' takes 17 x 13, 'other' takes 9 x 9; make one bank per size"):
        cl.ModelBank([*small_bank.models, other])
    shifted = dataclasses.replace(small_bank.models[0], name="shifted", image_mean=(1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="one bank per mean"):
        cl.ModelBank([*small_bank.models, shifted])
    with pytest.raises(ValueError, match="at least one model"):
        cl.ModelBank([])
    with pytest.raises(ValueError, match="more than once: model0"):
        cl.ModelBank([small_bank.models[0], small_bank.models[0]])


def test_to(small_bank: cl.ModelBank) -> None:
    assert small_bank.to("cpu") is small_bank
    away = small_bank.to("meta")
    assert away.device == torch.device("meta")
    assert away.names == small_bank.names


def test_a_bank_is_no_larger_than_its_models() -> None:
    """Heterogeneous shapes are not padded to the largest."""
    mixed = random_inputs(CASES[14]).bank
    alone = sum(mixed.select(n).weights.numel() for n in range(len(mixed)))
    assert mixed.weights.numel() <= alone

"""The published V4 models through the CUDA kernels' own source on a CPU, against their reference predictions."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from emulated_bank import EmulatedBank

import cortexloop as cl
from cortexloop.testing import Inputs, without_kinks

EVERY = 8  # every eighth model: an image and a model take a twentieth of a second


@pytest.fixture(scope="module")
def golden(v4_data: Path) -> dict[str, Any]:
    with np.load(v4_data / "reference_predictions.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def bank(v4_data: Path) -> cl.ModelBank:
    whole = cl.ModelBank.load(v4_data / "compact_models.npz")
    return whole.select(slice(0, len(whole), EVERY))


def test_responses(emulated_cuda: ModuleType, bank: cl.ModelBank, golden: dict[str, Any]) -> None:
    """Each model on an image of its own. Of a standard deviation of 0.75, exact was seen to miss 1.3e-6, fast 2e-3."""
    rows = np.arange(len(bank)) % 48
    names = (name.split("/neuron") for name in bank.names)
    expected = np.stack([golden[f"predictions/{s}"][int(n), row] for (s, n), row in zip(names, rows, strict=True)])
    pixels = torch.from_numpy(golden["images_uint8"][rows])
    on_device = EmulatedBank(emulated_cuda, bank)
    assert on_device.note == ""
    pairs = torch.arange(len(bank))
    for images in (pixels, torch.as_tensor(cl.recenter(pixels))):
        got = on_device.forward(images, pairs=pairs).double().numpy()
        assert np.abs(got - expected).max() < 5e-6
        got = on_device.forward(images, pairs=pairs, precision="fast").double().numpy()
        assert np.abs(got - expected).max() < 1e-2


def test_gradients(emulated_cuda: ModuleType, v4_data: Path, golden: dict[str, Any]) -> None:
    """To 1e-5 where no ReLU gate lies within rounding of zero; elsewhere single gates may flip."""
    whole = cl.ModelBank.load(v4_data / "compact_models.npz")
    images = torch.from_numpy(golden["images_uint8"][golden["gradient_image_rows"]])
    nothing = torch.empty(0)
    clear = []
    for (session, neuron), expected in zip(golden["gradient_models"], golden["input_gradients"], strict=True):
        model = whole.select(f"{session}/neuron{neuron}")
        got, _ = EmulatedBank(emulated_cuda, model).gradient(images, torch.ones(3, 1))
        for i in range(3):
            one = torch.as_tensor(cl.recenter(images[i : i + 1]))
            clear.append(bool(without_kinks(Inputs(nothing, one, model, nothing, nothing), band=3e-8)))
            error = np.linalg.norm(got[i].numpy() - expected[i]) / np.linalg.norm(expected[i])
            assert error < (1e-5 if clear[-1] else 5e-3)
    assert any(clear)

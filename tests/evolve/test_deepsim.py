"""The published networks: against networks written down a second time, and every way of naming their weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from cortexloop.evolve.generators import GENERATORS, DeePSimGenerator

# Shapes of the weights as published: torch's [out, in, ...], and [in, out, ...] of transposed convolutions.
RISING = {
    "conv5_1": (256, 512, 3, 3),
    "deconv4": (512, 256, 4, 4),
    "conv4_1": (256, 256, 3, 3),
    "deconv3": (256, 128, 4, 4),
    "conv3_1": (128, 128, 3, 3),
    "deconv2": (128, 64, 4, 4),
    "deconv1": (64, 32, 4, 4),
    "deconv0": (32, 3, 4, 4),
}
FC8 = {
    "defc7": (4096, 1000),
    "defc6": (4096, 4096),
    "defc5": (4096, 4096),
    "deconv5": (256, 256, 4, 4),
    **RISING,
}
FC6 = {**FC8, "defc7": (4096, 4096)}
POOL5 = {
    "Rconv6": (512, 256, 3, 3),
    "Rconv7": (512, 512, 3, 3),
    "Rconv8": (512, 512, 3, 3),
    "deconv5": (512, 256, 4, 4),
    **RISING,
}
CONV = {
    "Rconv6": (384, 384, 3, 3),
    "Rconv7": (512, 384, 3, 3),
    "Rconv8": (512, 512, 2, 2),
    "deconv5": (512, 256, 4, 4),
    "conv5_1": (256, 256, 3, 3),
    "deconv4": (256, 128, 4, 4),
    "conv4_1": (128, 128, 3, 3),
    "deconv3": (128, 128, 4, 4),
    "conv3_1": (128, 128, 3, 3),
    "deconv2": (128, 64, 4, 4),
    "conv2_1": (32, 64, 3, 3),
    "deconv1": (32, 16, 4, 4),
    "conv1_1": (3, 16, 3, 3),
}
NORM2 = {
    "Rconv6": (256, 256, 3, 3),
    "Rconv7": (128, 256, 3, 3),
    "Rconv8": (128, 128, 3, 3),
    "deconv4": (128, 128, 4, 4),
    "conv4_1": (128, 128, 3, 3),
    "deconv3": (128, 64, 4, 4),
    "conv3_1": (64, 64, 3, 3),
    "deconv2": (64, 32, 4, 4),
    "conv2_1": (32, 32, 3, 3),
    "deconv1": (32, 16, 4, 4),
    "conv1_1": (3, 16, 3, 3),
}
NORM1 = {**NORM2, "Rconv6": (128, 96, 3, 3), "Rconv7": (128, 128, 3, 3)}
SHAPES = {
    "fc6": FC6,
    "fc6_eucl": FC6,
    "fc7": FC6,
    "fc8": FC8,
    "pool5": POOL5,
    "conv3": CONV,
    "conv4": CONV,
    "norm1": NORM1,
    "norm2": NORM2,
}
ENDS_IN_TANH = ("conv3", "conv4", "norm1", "norm2")
LENGTH = {"fc8": 1000, "pool5": 256 * 6 * 6, "conv3": 384 * 169, "conv4": 384 * 169, "norm1": 96 * 729}
LENGTH |= {"norm2": 256 * 169, "fc6": 4096, "fc6_eucl": 4096, "fc7": 4096}

# The same layers in XDREAM's translation, where its names differ.
XDREAM = {f"defc{i}": f"fc{i}" for i in (5, 6, 7)} | {f"Rconv{i}": f"conv{i}" for i in (6, 7, 8)}
XDREAM_RISING = {f"conv{i}_1": f"tconv{i}_1" for i in (3, 4, 5)} | {f"deconv{i}": f"tconv{i}_0" for i in (3, 4, 5)}
XDREAM_FC = {**XDREAM, **XDREAM_RISING, "deconv2": "tconv2", "deconv1": "tconv1", "deconv0": "tconv0"}
XDREAM_NORM = {**XDREAM, **{f"deconv{i}": f"tconv{i}_0" for i in (1, 2, 3, 4)}}


@lru_cache(maxsize=1)
def weights(variant: str) -> dict[str, Tensor]:
    """Random, of about unit gain, with all biases; `deconv` layers see a quarter of their window at each place."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for layer, shape in SHAPES[variant].items():
        up = layer.startswith("deconv") or (layer.startswith("conv") and variant[:2] in ("fc", "po") and "_" in layer)
        up = up or (variant[:2] == "co" and layer in ("conv5_1", "conv4_1", "conv3_1"))
        fan = (shape[0] if up else shape[1]) * (4 if layer.startswith("deconv") else int(np.prod(shape[2:])))
        last = 30.0 if layer == "deconv0" else 1.0
        state[f"{layer}.weight"] = torch.randn(shape, generator=generator) * (last * (1.8 / fan) ** 0.5)
        count = shape[1] if up else shape[0]
        state[f"{layer}.bias"] = 0.1 * torch.randn(count, generator=generator) * last
    return state


def codes(variant: str, count: int) -> Tensor:
    return torch.randn(count, LENGTH[variant], generator=torch.Generator().manual_seed(2))


def plain(variant: str, state: dict[str, Tensor], code: Tensor) -> Tensor:
    """The network once more, in functions; BGR relative to the mean."""

    def leaky(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.3 * x)

    def convolve(x: Tensor, layer: str, stride: int = 1, padding: int = 1) -> Tensor:
        return functional.conv2d(x, state[f"{layer}.weight"], state[f"{layer}.bias"], stride, padding)

    def up(x: Tensor, layer: str, stride: int) -> Tensor:
        return functional.conv_transpose2d(x, state[f"{layer}.weight"], state[f"{layer}.bias"], stride, padding=1)

    if variant.startswith("fc"):
        x = code
        for layer in ("defc7", "defc6", "defc5"):
            x = leaky(x @ state[f"{layer}.weight"].T + state[f"{layer}.bias"])
        x = x.reshape(-1, 256, 4, 4)
    elif variant == "pool5":
        x = leaky(convolve(code.reshape(-1, 256, 6, 6), "Rconv6"))
        x = leaky(convolve(leaky(convolve(x, "Rconv7")), "Rconv8", padding=0))
        assert x.shape[2:] == (4, 4)
    elif variant.startswith("conv"):
        x = leaky(convolve(code.reshape(-1, 384, 13, 13), "Rconv6", padding=0))
        x = leaky(convolve(leaky(convolve(x, "Rconv7", padding=0)), "Rconv8", padding=0))
        assert x.shape[2:] == (8, 8)
    else:
        side, stride = (27, 2) if variant == "norm1" else (13, 1)
        x = leaky(convolve(code.reshape(len(code), -1, side, side), "Rconv6", stride, padding=2))
        x = leaky(convolve(leaky(convolve(x, "Rconv7")), "Rconv8"))
        assert x.shape[2:] == (15, 15)
        for level in (4, 3, 2):
            x = leaky(convolve(leaky(up(x, f"deconv{level}", 2)), f"conv{level}_1"))
        return 255 * torch.tanh(convolve(up(x, "deconv1", 2), "conv1_1"))
    for level in (5, 4, 3):
        x = leaky(up(leaky(up(x, f"deconv{level}", 2)), f"conv{level}_1", 1))
    x = leaky(up(x, "deconv2", 2))
    if variant.startswith("conv"):
        x = leaky(up(leaky(convolve(x, "conv2_1")), "deconv1", 2))
        return 255 * torch.tanh(convolve(x, "conv1_1"))
    return up(leaky(up(x, "deconv1", 2)), "deconv0", 2)


def rgb(bgr: Tensor) -> Tensor:
    blue, green, red = bgr.unbind(1)
    return torch.stack((red + 123, green + 117, blue + 104), dim=1).clamp(0, 255) / 255


@pytest.mark.parametrize("variant", ["fc6", "pool5", "conv4", "norm1", "norm2"])
def test_equals_the_network_written_down_again(variant: str):
    generator = DeePSimGenerator(weights(variant), variant, batch=2)
    code = codes(variant, 3)
    found = generator(code)
    side = 240 if variant.startswith("norm") else 256
    assert (generator.dim, generator.height, generator.width) == (LENGTH[variant], side, side)
    assert found.shape == (3, 3, side, side)
    expected = rgb(plain(variant, weights(variant), code))
    inside = ((expected > 0) & (expected < 1)).float().mean()
    assert inside > 0.2  # or clipping would hide differences
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert (found - expected).abs().mean() < 1e-5


def test_channel_order():
    """Only the last bias is not zero: a known BGR colour in levels relative to the mean."""
    state = {name: torch.zeros_like(value) for name, value in weights("fc8").items()}
    state["deconv0.bias"] = torch.tensor([-104.0, 10.0, 300.0])
    image = DeePSimGenerator(state, "fc8", batch=1)(torch.zeros(1000))
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([255.0, 127.0, 0.0]) / 255)  # red is clipped from 423
    assert torch.equal(image, image[:, :1, :1].expand_as(image))
    state = {name: torch.zeros_like(value) for name, value in weights("norm2").items()}
    state["conv1_1.bias"] = torch.atanh(torch.tensor([0.2, 0.0, -0.1]))
    image = DeePSimGenerator(state, "norm2", batch=1)(torch.zeros(256 * 169))
    expected = torch.tensor([123 - 25.5, 117.0, 104 + 51.0]) / 255
    torch.testing.assert_close(image[:, 7, 9], expected)


@pytest.fixture
def restore_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_bits_depend_on_the_code_alone(restore_torch_threads: None):
    torch.set_num_threads(2)
    generator = DeePSimGenerator(weights("norm2"), "norm2", batch=3)
    code = codes("norm2", 4)
    alone = torch.cat([generator(c) for c in code.split(1)])
    for count in (2, 3, 4):
        assert torch.equal(generator(code[:count]), alone[:count])
    assert torch.equal(generator(code.flip(0)), alone.flip(0))
    assert torch.equal(generator(code.view(2, 2, -1)), alone.view(2, 2, 3, 240, 240))


def test_gradient_to_the_code():
    generator = DeePSimGenerator(weights("norm1"), "norm1", batch=2)
    code = codes("norm1", 3).requires_grad_()
    image = generator(code)
    (gradient,) = torch.autograd.grad(image[1].mean(), code)
    assert gradient[1].abs().max() > 0
    assert torch.equal(gradient[[0, 2]], torch.zeros(2, generator.dim))
    assert not generator(code.detach()).requires_grad


def test_half_precision():
    code = codes("norm1", 2)
    exact = DeePSimGenerator(weights("norm1"), "norm1", batch=2)(code)
    generator = DeePSimGenerator(weights("norm1"), "norm1", batch=2, dtype=torch.bfloat16)
    found = generator(code)
    assert found.dtype == torch.float32
    assert generator.settings()["dtype"] == "bfloat16"
    assert 1e-5 < (found - exact).abs().mean() < 0.05
    assert generator.to("cpu") is generator


# --- names of weights -----------------------------------------------------------------------------------------------


def renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {
        ".".join((names.get(key.split(".")[0], key.split(".")[0]), key.split(".")[1])): v for key, v in state.items()
    }


def without_zero_biases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.endswith("bias") or k.startswith(("defc", "Rconv"))}


@pytest.mark.parametrize("variant", ["fc8", "pool5", "conv4", "norm2"])
def test_both_published_sets_of_names(variant: str, tmp_path: Path):
    """XDREAM's names, without the biases that are zero; the others with `.1` as some files have it, and nested."""
    state = {k: v if not k.endswith("bias") else torch.zeros_like(v) for k, v in weights(variant).items()}
    state |= {k: v for k, v in weights(variant).items() if k.startswith(("defc", "Rconv"))}
    names = {**XDREAM_FC, "deconv2": "tconv2_0", "deconv1": "tconv1_0"} if variant == "conv4" else XDREAM_FC
    names = XDREAM_NORM if variant == "norm2" else names
    xdream = renamed(without_zero_biases(state), names)
    assert len(xdream) < len(state)
    infix = {".1.".join(key.split(".")): value for key, value in state.items()}
    code = codes(variant, 1)
    expected = DeePSimGenerator(state, variant, batch=1)(code)
    assert torch.equal(DeePSimGenerator(xdream, variant, batch=1)(code), expected)
    torch.save({"epoch": 2, "state_dict": {f"module.G.{key}": v for key, v in infix.items()}}, tmp_path / "w.pth")
    assert torch.equal(DeePSimGenerator(tmp_path / "w.pth", variant, batch=1)(code), expected)


def test_file_formats_and_settings(tmp_path: Path):
    state = weights("norm1")
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "w.safetensors")
    code = codes("norm1", 1)
    expected = DeePSimGenerator(state, "norm1", batch=1)(code)
    for name in ("new.pt", "old.pt", "w.safetensors"):
        generator = GENERATORS["deepsim-norm1"](weights=tmp_path / name, batch=1)
        assert torch.equal(generator(code), expected)
        settings = json.loads(json.dumps(generator.settings()))
        digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert settings == {
            "generator": "deepsim-norm1",
            "weights": name,
            "sha256": digest,
            "dtype": "float32",
            "batch": 1,
        }
    arrays = {key: value.numpy() for key, value in state.items()}
    from_arrays = DeePSimGenerator(arrays, "norm1", batch=1)
    assert torch.equal(from_arrays(code), expected)
    first = from_arrays.settings()["sha256"]
    arrays["Rconv7.bias"] = arrays["Rconv7.bias"] + 1
    assert DeePSimGenerator(arrays, "norm1").settings()["sha256"] != first


def test_wrong_weights_are_all_named():
    state = dict(weights("norm2"))
    del state["Rconv7.weight"], state["Rconv8.bias"], state["deconv3.bias"]  # the last may be missing
    state["extra.weight"] = torch.zeros(2)
    state["tconv4_0.weight"] = state["deconv4.weight"]
    state["conv2_1.weight"] = torch.zeros(32, 31, 3, 3)
    state["conv3_1.bias"] = torch.zeros(64, dtype=torch.int64)
    state["conv1_1.bias"] = torch.tensor([0.0, float("nan"), 0.0])
    with pytest.raises(ValueError, match=r"the weights cannot be used as norm2 weights: ") as found:
        DeePSimGenerator(state, "norm2")
    message = str(found.value)
    for part in (
        "Rconv7.weight (or conv7.weight) is missing",
        "Rconv8.bias (or conv8.bias) is missing",
        "extra.weight is unknown",
        "deconv4.weight and tconv4_0.weight are the same parameter",
        "conv2_1.weight should be floating point [32, 32, 3, 3], is float32 [32, 31, 3, 3]",
        "conv3_1.bias should be floating point [64], is int64 [64]",
        "conv1_1.bias holds NaN or infinity",
    ):
        assert part in message
    assert "deconv3" not in message


def test_other_errors(tmp_path: Path):
    with pytest.raises(ValueError, match=r"variant should be one of fc6, fc6_eucl, fc7, .*, got 'fc9'"):
        DeePSimGenerator({}, "fc9")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        DeePSimGenerator(tmp_path / "none.pt")
    with pytest.raises(TypeError, match=r"dtype should be torch\.float32, .*, got torch\.float64"):
        DeePSimGenerator({}, dtype=torch.float64)
    torch.save(weights("norm1"), tmp_path / "norm1.pt")
    with pytest.raises(ValueError, match=r"'norm1\.pt' cannot be used as norm2 weights: .*Rconv6\.weight should be"):
        DeePSimGenerator(tmp_path / "norm1.pt", "norm2")
    with pytest.raises(ValueError, match="batch should be from 1 to 4096, got 0"):
        DeePSimGenerator({}, batch=0)


def test_every_published_network_has_its_shapes():
    """Also those that differ from another one in their weights only."""
    assert {f"deepsim-{variant}" for variant in SHAPES} == {name for name in GENERATORS if name.startswith("deepsim")}
    for variant, shapes in SHAPES.items():
        with pytest.raises(ValueError, match="is missing") as found:
            DeePSimGenerator({f"{layer}.weight": np.zeros((1,), np.float32) for layer in shapes}, variant)
        for layer, shape in shapes.items():
            assert f"{layer}.weight should be floating point {list(shape)}," in str(found.value)

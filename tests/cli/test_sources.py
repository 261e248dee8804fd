"""Sources of features as the command line names them: the right features, and one sentence for what cannot be."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

import cortexloop as cl
from cortexloop import features, io
from cortexloop.cli.console import BadInputError
from cortexloop.cli.sources import SourceOptions, open_source, restored
from cortexloop.models import SharedCompactModel
from cortexloop.textbook import procedural_images, textbook_neurons

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2, padding=1))

    def forward(self, x):
        return self.second(self.first(x)).mean((2, 3))

def small():
    torch.manual_seed(3)
    return Net()

def broken():
    raise OSError("no weights here")

def number():
    return 3

constant = 5
"""


@pytest.fixture(scope="module")
def bank_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bank") / "bank.safetensors"
    cl.ModelBank.from_weights(textbook_neurons()[:3]).save(path)
    return path


@pytest.fixture(scope="module")
def network_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "net.py"
    path.write_text(NETWORK)
    return path


@pytest.fixture(scope="module")
def shared_file(tmp_path_factory):
    """A pack with one shared model, in the layout of the published one; its parameters are from a seed."""
    path = tmp_path_factory.mktemp("shared") / "shared.npz"
    model = SharedCompactModel([2, 3, 4, 4, 5], neurons=2, generator=torch.Generator().manual_seed(1))
    weights = model.to_weights("toy")
    tensors = {
        "mixing/kernel": weights.mixing[None, None],
        "mixing/bias": weights.mixing_bias,
        "spatial_pool/depthwise_kernel": weights.spatial[..., None],
        "spatial_pool/bias": weights.spatial_bias,
    }
    for i, layer in enumerate(weights.layers):
        tensors |= {
            f"layer{i}/bias": layer.bias, f"layer{i}/gamma": layer.gamma, f"layer{i}/beta": layer.beta,
            f"layer{i}/moving_mean": layer.mean, f"layer{i}/moving_variance": layer.variance,
        }  # fmt: skip
        if layer.kernel is not None:
            tensors[f"layer{i}/kernel"] = layer.kernel
        else:
            assert layer.depthwise is not None
            assert layer.pointwise is not None
            tensors[f"layer{i}/depthwise_kernel"] = layer.depthwise[..., None]
            tensors[f"layer{i}/pointwise_kernel"] = layer.pointwise[None, None]
    np.savez(path, **{f"toy/filters2/{name}": array for name, array in tensors.items()})
    return path


@pytest.fixture(scope="module")
def images():
    return procedural_images(3, 1)


def refused(**options):
    with pytest.raises(BadInputError) as caught:
        open_source(SourceOptions(**options))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_layer_of_a_compact_model(bank_file, images):
    opened = open_source(SourceOptions(models=bank_file, model="edge_45deg", layer="layer2", device="cpu"))
    bank = cl.ModelBank.load(bank_file)
    expected = cl.activations(images, bank.select("edge_45deg"), 2)[0].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(opened.source(images).numpy(), expected)
    assert opened.size == (112, 112)
    last = open_source(SourceOptions(models=bank_file, model="edge_45deg", device="cpu"))
    assert last.source.name.endswith("layer4")


def test_layer_of_a_shared_model(shared_file, images):
    opened = open_source(SourceOptions(models=shared_file, layer="3", device="cpu"))
    trunk = SharedCompactModel.from_weights(io.load_shared(shared_file)[0]).trunk
    with torch.no_grad():
        expected = trunk.activity(cl.recenter(torch.from_numpy(images).float(), trunk.image_mean), 3)
    torch.testing.assert_close(opened.source(images), expected.permute(0, 3, 1, 2), rtol=0, atol=1e-6)


def test_network_of_a_file(network_file, tmp_path):
    options = SourceOptions(
        network=f"{network_file}:small", layer="second.1", size="16x20", mean="0.5", std="0.25,0.5,1", device="cpu"
    )
    opened = open_source(options)
    assert opened.source.feature_shape() == (5, 8, 10)
    assert opened.size == (16, 20)
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 20, 3), np.uint8)
    module = opened.source.module
    x = (torch.from_numpy(images).double() / 255 - 0.5) / torch.tensor([0.25, 0.5, 1.0])
    with torch.no_grad():
        expected = module.second(module.first(x.permute(0, 3, 1, 2).float()))
    torch.testing.assert_close(opened.source(images), expected, rtol=1e-4, atol=1e-5)

    checkpoint = tmp_path / "weights.pt"
    other = {name: value + 1 for name, value in module.state_dict().items()}
    torch.save({"state_dict": {f"module.{name}": value for name, value in other.items()}}, checkpoint)
    loaded = open_source(SourceOptions(**{**vars(options), "weights": str(checkpoint)}))
    assert torch.equal(loaded.source.module.first.bias, other["first.bias"])


def test_stored_options_make_the_same_source(bank_file):
    options = SourceOptions(models=bank_file, model="edge_0deg", layer="1", batch=7, device="cpu")
    assert restored(options.stored(), batch=7, device="cpu") == options


def test_built_in_filters_prefer_what_their_names_say():
    opened = open_source(SourceOptions(device="cpu"))
    rows = np.arange(112)[:, None, None]
    contour = np.where(rows < 56, 230, 25).astype(np.uint8)  # horizontal, lighter above
    maps = opened.source(np.broadcast_to(contour, (112, 112, 3))[None].copy())[0]
    assert opened.channels is not None
    assert opened.channels[int(maps.amax((1, 2)).argmax())] == "edge 0\N{DEGREE SIGN} \N{UPWARDS ARROW}"
    assert len(set(opened.channels)) == maps.shape[0]


def test_a_package_that_is_not_there(monkeypatch):
    for package in ("timm", "torchvision"):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}.models", None)
        assert f"pip install {package}" in refused(network=f"{package}:resnet18", layer="layer1", device="cpu")


def test_networks_of_a_package(monkeypatch):
    """A stand-in for torchvision, which the tests do not need."""
    made = []

    def get_model(name, weights):
        made.append((name, weights))
        return torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3))

    package = types.ModuleType("torchvision.models")
    package.list_models = lambda module: ["resnet18", "resnet50", "vgg16"]
    package.get_model = get_model
    parent = types.ModuleType("torchvision")
    parent.models = package
    monkeypatch.setitem(sys.modules, "torchvision", parent)
    monkeypatch.setitem(sys.modules, "torchvision.models", package)
    opened = open_source(SourceOptions(network="torchvision:resnet18", layer="0", device="cpu"))
    assert made == [("resnet18", None)]
    assert opened.size == (224, 224)
    assert "random weights" in opened.notes[0]
    again = open_source(SourceOptions(network="torchvision:resnet18", layer="0", device="cpu"))
    assert torch.equal(opened.source.module[0].weight, again.source.module[0].weight)
    assert isinstance(opened.source, features.ModuleFeatures)
    assert "resnet50" in refused(network="torchvision:resnet5", layer="0", device="cpu")
    assert not open_source(
        SourceOptions(network="torchvision:vgg16", weights="pretrained", layer="0", device="cpu")
    ).notes
    assert made[-1] == ("vgg16", "DEFAULT")


def test_what_cannot_be_is_told_in_one_sentence(bank_file, network_file, shared_file, tmp_path):
    assert "choose one with --model" in refused(models=bank_file)
    assert "edge_0deg" in refused(models=bank_file, model="edge_0de")
    assert "layer4" in refused(models=bank_file, model="edge_0deg", layer="layer7")
    assert "layer0" in refused(models=shared_file, layer="pool")
    assert "give one of them" in refused(models=bank_file, network="timm:x")
    assert "--size belongs to --network" in refused(models=bank_file, model="edge_0deg", size="224")
    assert "--models" in refused(model="edge_0deg")
    assert "there is no file" in refused(models=tmp_path / "none.safetensors")
    assert "needs --layer" in refused(network=f"{network_file}:small")
    assert "needs --size" in refused(network=f"{network_file}:small", layer="first")
    assert "first" in refused(network=f"{network_file}:small", layer="frist", size="16")
    assert "small" in refused(network=f"{network_file}:smal", layer="first", size="16")
    assert "no weights here" in refused(network=f"{network_file}:broken", layer="first", size="16")
    assert "gives a int" in refused(network=f"{network_file}:number", layer="first", size="16")
    assert "no such file" in refused(network=f"{tmp_path}/none.py:small", layer="first", size="16")
    assert "torchvision:NAME" in refused(network="resnet50", layer="first")
    assert "224x224" in refused(network=f"{network_file}:small", layer="first", size="big")
    assert "--mean" in refused(network=f"{network_file}:small", layer="first", size="16", mean="1,2")
    assert "--std" in refused(network=f"{network_file}:small", layer="first", size="16", std="0")
    assert "--batch" in refused(batch=0)
    assert "--device" in refused(device="gpu")
    checkpoint = tmp_path / "other.pt"
    torch.save({"nothing": torch.zeros(2)}, checkpoint)
    assert "lacks" in refused(network=f"{network_file}:small", layer="first", size="16", weights=str(checkpoint))
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name")
    assert "cannot be run" in refused(network=f"{broken}:small", layer="first", size="16")

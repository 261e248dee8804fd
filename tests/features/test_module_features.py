"""A layer of a torch module as a source of features."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cortexloop.features import ModuleFeatures, Preprocess, find_layer
from cortexloop.models import SharedCompactModel
from cortexloop.testing import SmallResNet

SIZE = 32
PREPROCESS = Preprocess.imagenet(SIZE)


@pytest.fixture(scope="module")
def network() -> SmallResNet:
    return SmallResNet()


@pytest.fixture
def images(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, size=(5, SIZE, SIZE, 3), dtype=np.uint8)


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def by_hand(network: SmallResNet, images: np.ndarray) -> Tensor:
    """layer3.0, with all steps written out."""
    x = torch.from_numpy(images).float().permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(PREPROCESS.mean)[:, None, None]) / torch.tensor(PREPROCESS.std)[:, None, None]
    with torch.no_grad():
        x = network.maxpool(torch.relu(network.bn1(network.conv1(x))))
        return network.layer3[0](network.layer2(network.layer1(x)))


def test_features_are_those_of_the_layer(network, images):
    source = ModuleFeatures(network, "layer3.0", preprocess=PREPROCESS)
    assert source.feature_shape() == (128, 2, 2)
    features = source(images)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    torch.testing.assert_close(features, by_hand(network, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [".layer3.Bottleneck0", "layer3.Bottleneck0", ".layer3.0", "layer3.0"])
def test_published_forms_of_names(network, name):
    assert find_layer(network, name) == ("layer3.0", network.layer3[0])


def test_names_of_classes_go_with_names_of_children(network):
    assert find_layer(network, ".Linearfc")[0] == "fc"
    assert find_layer(network, "layer1.Bottleneck0.Conv2dconv2")[0] == "layer1.0.conv2"


def test_unknown_layers_are_answered_with_near_names(network):
    with pytest.raises(ValueError, match=r"no layer 'layer3\.5'; near are .*layer3"):
        ModuleFeatures(network, "layer3.5", preprocess=PREPROCESS)
    with pytest.raises(ValueError, match="no layer ''; its layers start with conv1"):
        find_layer(network, "")


def test_nothing_behind_the_layer_is_computed(images):
    network = SmallResNet()
    source = ModuleFeatures(network, "layer2", preprocess=PREPROCESS)
    called = []
    network.layer3.register_forward_hook(lambda *_: called.append(1))
    source(images)
    assert called == []


def test_no_hook_stays(images):
    network = SmallResNet()
    kept = network.layer1.register_forward_hook(lambda *_: None)
    before = hooks(network)
    source = ModuleFeatures(network, "layer2", preprocess=PREPROCESS)
    source(images)
    source.differentiable(torch.from_numpy(images).float())
    with pytest.raises(ValueError, match="images are 8 x 8"):
        source(images[:, :8, :8])

    def fail(*_: object) -> None:
        raise ArithmeticError("in the network")

    failing = network.layer1.register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        source(images)
    failing.remove()
    with pytest.raises(ValueError, match="called 3 times"):
        ModuleFeatures(network, "layer1.0.relu", preprocess=PREPROCESS)
    assert hooks(network) == before
    kept.remove()
    assert hooks(network) == 0


def test_networks_that_catch_errors_do_not_catch_the_stop(images):
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = SmallResNet()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.inner(x)
            except Exception as error:
                raise AssertionError("an error was seen") from error

    careful = Careful().eval()
    assert ModuleFeatures(careful, "inner.layer2", preprocess=PREPROCESS)(images).shape == (5, 64, 4, 4)


def test_what_works_in_place_behind_the_layer_does_not_reach_the_features(network, images):
    """bn1 is followed by an in-place ReLU; the call that counts occurrences runs through it."""
    source = ModuleFeatures(network, "bn1", preprocess=PREPROCESS)
    assert (source(images) < 0).any()
    assert (source.differentiable(torch.from_numpy(images).float()) < 0).any()


def test_a_layer_that_works_in_place_itself(network, images):
    rectified = ModuleFeatures(network, "relu", preprocess=PREPROCESS)(images)
    linear = ModuleFeatures(network, "bn1", preprocess=PREPROCESS)(images)
    assert torch.equal(rectified, torch.relu(linear))


def test_occurrences_of_a_shared_layer(network, images):
    last = ModuleFeatures(network, "layer1.0.relu", occurrence=2, preprocess=PREPROCESS)
    block = ModuleFeatures(network, "layer1.0", preprocess=PREPROCESS)
    assert torch.equal(last(images), block(images))
    first = ModuleFeatures(network, "layer1.0.relu", occurrence=0, preprocess=PREPROCESS)
    assert first.feature_shape() == (8, 8, 8)
    with pytest.raises(ValueError, match="there is no call 3"):
        ModuleFeatures(network, "layer1.0.relu", occurrence=3, preprocess=PREPROCESS)


def test_batches_and_streams_give_the_same_features(network, images):
    whole = ModuleFeatures(network, "layer2", preprocess=PREPROCESS)(images)
    source = ModuleFeatures(network, "layer2", preprocess=PREPROCESS, batch=2)
    torch.testing.assert_close(source(images), whole)
    parts = list(source.stream(images))
    assert [len(part) for part in parts] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(parts), whole)
    # arrays of odd lengths are put together and cut
    parts = list(source.stream([images[:1], images[1:1], images[1:4], images[4:]]))
    assert [len(part) for part in parts] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(parts), whole)
    with pytest.raises(ValueError, match="one dtype and size"):
        list(source.stream([images[:1], images[1:2].astype(np.float32)]))
    assert source(images[:0]).shape == (0, 64, 4, 4)


def test_the_gradient_is_that_of_the_layer(network, images):
    source = ModuleFeatures(SmallResNet().double(), "layer3.0", preprocess=PREPROCESS)
    levels = torch.from_numpy(images).double().requires_grad_()
    features = source.differentiable(levels)
    assert features.dtype == torch.float64
    cotangent = torch.randn(features.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(features, levels, cotangent)
    direction = torch.randn(levels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = 1e-6
    with torch.no_grad():
        up, down = (source.differentiable(levels + sign * step * direction) for sign in (1, -1))
    numeric = ((up - down) * cotangent).sum() / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-5, atol=1e-8)


def test_parameters_are_left_alone(images):
    network = SmallResNet()
    network.conv1.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    source = ModuleFeatures(network, "layer2", preprocess=PREPROCESS)
    levels = torch.from_numpy(images).float().requires_grad_()
    torch.autograd.grad(source.differentiable(levels).sum(), levels)
    assert [p.requires_grad for p in network.parameters()] == [False] + [True] * (len(list(network.parameters())) - 1)
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not any(part.training for part in network.modules())


@pytest.mark.parametrize(("precision", "limit"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_reduced_precision_is_near(network, images, precision, limit):
    exact = ModuleFeatures(network, "layer2", preprocess=PREPROCESS)(images)
    rounded = ModuleFeatures(network, "layer2", preprocess=PREPROCESS, precision=precision)(images)
    assert rounded.dtype == torch.float32
    error = float((rounded - exact).square().mean().sqrt() / exact.std())
    assert 0 < error < limit


def test_channels_last_changes_nothing_but_rounding(network, images):
    plain = ModuleFeatures(network, "layer2", preprocess=PREPROCESS)(images)
    last = ModuleFeatures(network, "layer2", preprocess=PREPROCESS, channels_last=True)(images)
    assert last.is_contiguous()
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-4)


def test_vectors_are_maps_of_one_position(network, images):
    source = ModuleFeatures(network, "fc", preprocess=PREPROCESS)
    assert source.feature_shape() == (10, 1, 1)
    assert source(images).shape == (5, 10, 1, 1)


def test_maps_with_channels_last_axis(images):
    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.last = nn.Identity()
            self.tokens = nn.Identity()
            self.whole = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            maps = self.last(self.conv(x).permute(0, 2, 3, 1))
            self.whole({"maps": maps})
            return self.tokens(maps.flatten(1, 2))

    module = Permuted().eval()
    source = ModuleFeatures(module, "last", preprocess=PREPROCESS, layout="NHWC")
    assert source.feature_shape() == (4, 30, 30)
    assert torch.equal(source(images), ModuleFeatures(module, "conv", preprocess=PREPROCESS)(images))
    with pytest.raises(ValueError, match=r"gives \[1, 900, 4\]"):
        ModuleFeatures(module, "tokens", preprocess=PREPROCESS)
    with pytest.raises(ValueError, match="gives a dict"):
        ModuleFeatures(module, "whole", preprocess=PREPROCESS)


def test_layers_of_a_shared_compact_model(rng):
    model = SharedCompactModel((4, 6), 3, 5, (1, 2), 16, 12, generator=torch.Generator().manual_seed(0)).eval()
    pixels = rng.integers(0, 256, size=(2, 16, 12, 3), dtype=np.uint8)
    preprocess = Preprocess.recentred((16, 12))
    source = ModuleFeatures(model, "trunk.layers.1", preprocess=preprocess)
    assert source.feature_shape() == (6, 8, 6)
    recentred = torch.from_numpy(pixels).float() - torch.tensor(preprocess.mean)
    with torch.no_grad():
        assert torch.equal(source(pixels), model.activity(recentred, 1).permute(0, 3, 1, 2))
    assert torch.equal(source(pixels), ModuleFeatures(model, "trunk", preprocess=preprocess)(pixels))


def test_training_mode_is_refused(network, images):
    source = ModuleFeatures(network, "layer2", preprocess=PREPROCESS)
    network.layer1[0].bn2.train()
    try:
        with pytest.raises(ValueError, match=r"evaluation mode, its part 'layer1\.0\.bn2'"):
            source(images)
    finally:
        network.eval()
    source(images)


def test_failures_behind_the_layer():
    """The classifier does not fit images of this size; the layer does."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)).eval()
    with pytest.raises(ValueError, match=r"fails behind layer '0'.*occurrence=0"):
        ModuleFeatures(network, "0", preprocess=PREPROCESS)
    assert ModuleFeatures(network, "0", preprocess=PREPROCESS, occurrence=0).feature_shape() == (4, 30, 30)


def test_bad_arguments(network, images):
    def make(**options: object) -> ModuleFeatures:
        return ModuleFeatures(network, "layer2", **{"preprocess": PREPROCESS, **options})

    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        ModuleFeatures(lambda x: x, "layer2", preprocess=PREPROCESS)
    with pytest.raises(ValueError, match="say what the module takes"):
        ModuleFeatures(network, "layer2", size=32)
    with pytest.raises(ValueError, match="give either"):
        make(size=32)
    with pytest.raises(ValueError, match="precision"):
        make(precision="int8")
    with pytest.raises(ValueError, match="layout"):
        make(layout="NWHC")
    with pytest.raises(ValueError, match="batch"):
        make(batch=0)
    with pytest.raises(ValueError, match=r"the module is on cpu, device says meta"):
        make(device="meta")
    source = make()
    for bad, kind, sentence in (
        (images[0], ValueError, "add a batch axis"),
        (images.transpose(0, 3, 1, 2), ValueError, "put the channels last"),
        (images.astype(np.int64), TypeError, "uint8 or floating"),
        (images.astype(np.float32) / 255, ValueError, "multiply them by 255"),
        (np.full(images.shape, np.nan, np.float32), ValueError, "NaN"),
        (images.tolist(), TypeError, "NumPy array"),
        (images[:, :16], ValueError, "images are 16 x 32 pixels, the network takes 32 x 32"),
    ):
        with pytest.raises(kind, match=sentence):
            source(bad)
    with pytest.raises(TypeError, match="floating torch images"):
        source.differentiable(torch.from_numpy(images))


def test_size_mean_and_std_stand_for_a_preprocess(network, images):
    plain = ModuleFeatures(network, "layer2", size=SIZE, mean=PREPROCESS.mean, std=PREPROCESS.std)
    assert torch.equal(plain(images), ModuleFeatures(network, "layer2", preprocess=PREPROCESS)(images))


def test_other_threads_run_the_module_undisturbed(network, images):
    """A call by another thread, while this one watches the layer, is neither stopped nor counted."""
    levels = torch.zeros(1, 3, SIZE, SIZE)
    results = []

    def other() -> None:
        with torch.no_grad():
            results.append(network(levels).shape)

    def hook(*_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    source = ModuleFeatures(network, "layer2", preprocess=PREPROCESS)
    handle = network.layer1.register_forward_hook(hook)
    try:
        features = source(images)
    finally:
        handle.remove()
    assert results == [(1, 10)]
    torch.testing.assert_close(features, source(images))


def test_settings_are_plain(network):
    import json

    settings = ModuleFeatures(network, "layer2", preprocess=PREPROCESS).settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["preprocess"]["size"] == [SIZE, SIZE]

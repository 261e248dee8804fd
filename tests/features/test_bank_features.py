"""A layer of a bank's model as a source of features."""

from __future__ import annotations

import json

import pytest
import torch

import cortexloop as cl
from cortexloop.features import BankFeatures, ModuleFeatures, Preprocess
from cortexloop.features.base import GraphLinearization
from cortexloop.models import CompactModel, SharedCompactModel


@pytest.mark.parametrize(("model", "layer"), [(0, 0), (0, 1), (2, -1), ("model1", 0)])
def test_features_are_the_models_maps(small_bank, small_images, model, layer):
    source = BankFeatures(small_bank, model, layer)
    features = source(small_images)
    assert features.shape == (4, *source.feature_shape())
    index = small_bank.names.index(model) if isinstance(model, str) else model
    module = CompactModel.from_weights(small_bank.models[index]).double()
    with torch.no_grad():
        expected = module.activity(cl.recenter(small_images.double()), layer % len(small_bank.models[index].layers))
    torch.testing.assert_close(features.double(), expected.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)
    json.dumps(source.settings())


def test_uint8_and_floating_levels_agree(small_bank, small_images):
    source = BankFeatures(small_bank, 0, 1, batch=3)
    torch.testing.assert_close(source(small_images), source(small_images.float()), rtol=1e-6, atol=1e-6)


def test_gradients_are_those_of_the_module(small_bank, small_images):
    source = BankFeatures(small_bank, 2, 1)
    levels = small_images.double().requires_grad_()
    features = source.differentiable(levels)
    assert features.dtype == torch.float64
    cotangent = torch.randn(features.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(features, levels, cotangent)
    module = CompactModel.from_weights(small_bank.models[2]).double()
    maps = module.activity(levels - torch.tensor(small_bank.image_mean).float().double(), 1).permute(0, 3, 1, 2)
    (expected,) = torch.autograd.grad(maps, levels, cotangent)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_bad_arguments(small_bank, small_images):
    with pytest.raises(ValueError, match=r"has layers 0\.\.1, got 2"):
        BankFeatures(small_bank, 0, 2)
    with pytest.raises(ValueError, match="no model named"):
        BankFeatures(small_bank, "other", 0)
    with pytest.raises(ValueError, match="another input size"):
        BankFeatures(small_bank, 0, 0)(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_pullbacks_are_those_of_the_graph(small_bank, small_images, layer):
    source = BankFeatures(small_bank, 2, layer)
    linear = source.linearize(small_images)
    assert torch.equal(linear.features, source(small_images))
    cotangents = torch.randn((4, 5, *source.feature_shape()), generator=torch.Generator().manual_seed(0))
    expected = GraphLinearization(source, small_images.float()).pullback(cotangents)
    torch.testing.assert_close(linear.pullback(cotangents), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="cotangents should be"):
        linear.pullback(cotangents[0])


def test_trunks_of_shared_models(small_images):
    model = SharedCompactModel((4, 6), 3, 5, (1, 2), 17, 13, generator=torch.Generator().manual_seed(0)).eval()
    source = BankFeatures.of_weights(model.to_weights("shared"))
    module = ModuleFeatures(model, "trunk", preprocess=Preprocess.recentred((17, 13)))
    assert source.feature_shape() == module.feature_shape()
    torch.testing.assert_close(source(small_images), module(small_images), rtol=1e-4, atol=1e-4)
    linear = SharedCompactModel((4,), 3, 5, (1,), 17, 13, relu=False)
    with pytest.raises(ValueError, match="no ReLUs"):
        BankFeatures.of_weights(linear.to_weights("linear"))

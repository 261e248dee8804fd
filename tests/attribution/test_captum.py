"""The same numbers as captum's, on torch modules of the same networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum import attr as captum

import cortexloop as cl
from cortexloop.attribution import InputXGradient, IntegratedGradients, Occlusion, Readout, Saliency
from cortexloop.features import ModuleFeatures, Preprocess
from cortexloop.models import CompactModel
from cortexloop.testing import SmallResNet

SIZE, PREPROCESS = 16, Preprocess.imagenet(16)
NEURONS = [0, 3, 7]


@pytest.fixture(scope="module")
def network() -> SmallResNet:
    return SmallResNet().double()


@pytest.fixture
def pictures(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, size=(2, SIZE, SIZE, 3)).astype(np.float64)


def readout(network: SmallResNet) -> Readout:
    return Readout(ModuleFeatures(network, "fc", preprocess=PREPROCESS))


def per_level(attributions: torch.Tensor) -> torch.Tensor:
    """From gradients by normalised input [B, 3, H, W] to gradients by level."""
    gain = torch.tensor([PREPROCESS.scale / s for s in PREPROCESS.std], dtype=torch.float64)
    return attributions.permute(0, 2, 3, 1) * gain


def test_gradients_of_a_network(network, pictures):
    x = PREPROCESS(torch.from_numpy(pictures), torch.float64)
    maps = Saliency(readout(network)).attribute(pictures, neurons=NEURONS)
    products = InputXGradient(readout(network)).attribute(pictures, neurons=NEURONS)
    for k, neuron in enumerate(NEURONS):
        theirs = captum.Saliency(network).attribute(x.clone().requires_grad_(), target=neuron, abs=False)
        torch.testing.assert_close(maps[:, k], per_level(theirs), rtol=1e-9, atol=1e-12)
        theirs = captum.InputXGradient(network).attribute(x.clone().requires_grad_(), target=neuron)
        torch.testing.assert_close(products[:, k], theirs.permute(0, 2, 3, 1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("rule", "name"), [("gausslegendre", "gausslegendre"), ("midpoint", "riemann_middle")])
def test_integrated_gradients_of_a_network(network, pictures, rule, name):
    x = PREPROCESS(torch.from_numpy(pictures), torch.float64)
    method = IntegratedGradients(readout(network), steps=7, rule=rule)
    maps = method.attribute(pictures, neurons=NEURONS)
    deltas = method.convergence_delta(maps, pictures, neurons=NEURONS)
    for k, neuron in enumerate(NEURONS):
        theirs, delta = captum.IntegratedGradients(network).attribute(
            x, baselines=0, target=neuron, n_steps=7, method=name, return_convergence_delta=True
        )
        # captum rounds the weights of the steps to float32
        torch.testing.assert_close(
            maps[:, k], theirs.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-6 * float(theirs.abs().max())
        )
        torch.testing.assert_close(deltas[:, k], delta, rtol=1e-5, atol=1e-6)


def test_methods_on_a_bank(small_bank, small_images):
    """float64 images, so that the reference backend computes in float64."""
    images = small_images.double()
    mean = torch.tensor(small_bank.image_mean).float().double()
    for n, weights in enumerate(small_bank.models):
        module = CompactModel.from_weights(weights).double()
        x = images - mean
        for ours, theirs in (
            (Saliency(small_bank), captum.Saliency(module).attribute(x.clone().requires_grad_(), abs=False)),
            (InputXGradient(small_bank), captum.InputXGradient(module).attribute(x.clone().requires_grad_())),
            (IntegratedGradients(small_bank, steps=5), captum.IntegratedGradients(module).attribute(x, n_steps=5)),
        ):
            maps = ours.attribute(images, neurons=[n])[:, 0]
            # the bank's folded weights are float32, the module's parameters are not
            theirs = theirs.detach()
            torch.testing.assert_close(maps, theirs, rtol=1e-4, atol=2e-5 * float(theirs.abs().max()))


def test_occlusion_by_squares(small_bank, small_images):
    """Windows of 3 x 3 every 3 pixels, filled with the levels that the network sees as 0."""
    size = 12, 12
    shape = cl.testing.ModelShape((5, 7), (5, 3), (1, 2))
    bank = cl.testing.random_inputs(cl.testing.Case("square", 1, *size, (shape,))).bank
    images = small_images[:, :12, :12].double().contiguous()
    module = CompactModel.from_weights(bank.models[0]).double()
    x = images - torch.tensor(bank.image_mean).float().double()
    theirs = captum.Occlusion(module).attribute(x, sliding_window_shapes=(3, 3, 3), strides=(3, 3, 3), baselines=0)
    heat = Occlusion(bank, fill="zero", radius=1, stride=3, shape="square").attribute(images, neurons=[0])[:, 0]
    # captum gives the loss at every pixel of the window
    torch.testing.assert_close(heat, -theirs[:, 1::3, 1::3, 0].double(), rtol=1e-4, atol=1e-5)

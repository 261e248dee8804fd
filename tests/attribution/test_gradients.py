"""Gradient methods on banks and on readouts of any features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import cortexloop as cl
from cortexloop import attribution
from cortexloop.attribution import BankTarget, InputXGradient, IntegratedGradients, Readout, Saliency, SmoothGrad
from cortexloop.attribution.base import chunks
from cortexloop.features import BankFeatures, ModuleFeatures, Preprocess
from cortexloop.models import CompactModel, SharedCompactModel
from cortexloop.testing import SmallResNet

SIZE = 16


def compact_models(bank: cl.ModelBank) -> list[CompactModel]:
    return [CompactModel.from_weights(weights).double() for weights in bank.models]


def by_autograd(bank: cl.ModelBank, levels: Tensor) -> Tensor:
    """Gradients [B, N, H, W, 3] of the readable modules, float64."""
    leaf = cl.recenter(levels.double(), bank.image_mean).requires_grad_()
    rows = [torch.autograd.grad(module(leaf).sum(), leaf)[0] for module in compact_models(bank)]
    return torch.stack(rows, dim=1)


@pytest.fixture(scope="module")
def resnet() -> Readout:
    """The ten outputs of a network in float64."""
    return Readout(ModuleFeatures(SmallResNet().double(), "fc", preprocess=Preprocess.imagenet(SIZE)))


@pytest.fixture
def pictures(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, size=(2, SIZE, SIZE, 3), dtype=np.uint8)


def test_saliency_is_the_gradient(small_bank, small_images):
    maps = Saliency(small_bank).attribute(small_images)
    assert maps.shape == (4, 3, 17, 13, 3)
    expected = by_autograd(small_bank, small_images)
    torch.testing.assert_close(maps.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_float64_images_are_computed_in_float64(small_bank, small_images):
    maps = Saliency(small_bank).attribute(small_images.double())
    assert maps.dtype == torch.float64
    expected = by_autograd(small_bank, small_images)
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_neurons_and_pairs_pick_from_the_whole(small_bank, small_images):
    whole = Saliency(small_bank).attribute(small_images)
    some = Saliency(small_bank).attribute(small_images, neurons=[2, 0])
    assert torch.equal(some, whole[:, [2, 0]])
    one = Saliency(small_bank).attribute(small_images, neurons=1)
    assert torch.equal(one, whole[:, 1:2])
    pairs = np.array([0, 2, 1, 2])
    paired = Saliency(small_bank).attribute(small_images, pairs=pairs)
    assert torch.equal(paired, whole[torch.arange(4), torch.from_numpy(pairs)])


def test_chunks_change_no_bit(small_bank, small_images):
    for method in (Saliency, InputXGradient, SmoothGrad, IntegratedGradients):
        options = {SmoothGrad: {"samples": 2}, IntegratedGradients: {"steps": 2, "baseline": small_images.float() / 2}}
        whole = method(small_bank, **options.get(method, {})).attribute(small_images)
        per_image, per_pair = BankTarget(small_bank).memory(17, 13)
        for memory in (per_image + per_pair, per_image + 2 * per_pair, 2 * (per_image + 3 * per_pair)):
            narrow = method(small_bank, memory=memory, **options.get(method, {}))
            assert torch.equal(narrow.attribute(small_images), whole)
        assert torch.equal(narrow.attribute(small_images, pairs=[0, 1, 2, 0]), whole[range(4), [0, 1, 2, 0]])


def test_too_little_memory_is_said():
    with pytest.raises(ValueError, match="needs about 3 MiB, memory=1048576 allows 1 MiB"):
        list(chunks(1, 1, 2**21, 2**20, 2**20, paired=False))


@pytest.mark.parametrize(
    ("images", "neurons", "memory"), [(1, 1, 30), (5, 7, 30), (5, 7, 57), (5, 7, 10**6), (9, 2, 64)]
)
def test_chunks_cover_everything_once_within_the_budget(images, neurons, memory):
    seen = np.zeros((images, neurons), int)
    for rows, columns in chunks(images, neurons, 10, 20, memory, paired=False):
        seen[rows, columns] += 1
        height, width = seen[rows, columns].shape
        assert height * (10 + 20 * width) <= memory
    assert (seen == 1).all()


def test_a_readout_of_a_module_is_the_module(resnet, pictures):
    network = resnet.source.module
    preprocess = resnet.source.preprocess
    leaf = torch.from_numpy(pictures).double().requires_grad_()
    outputs = network(preprocess(leaf, torch.float64))
    expected = torch.stack([torch.autograd.grad(outputs[:, n].sum(), leaf, retain_graph=True)[0] for n in range(10)], 1)
    maps = Saliency(resnet).attribute(pictures.astype(np.float64))
    torch.testing.assert_close(maps, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        resnet.responses(leaf.detach(), torch.arange(10), False), outputs.detach(), rtol=1e-9, atol=1e-12
    )


def test_shared_models_on_the_banks_kernels(small_images):
    model = SharedCompactModel((5, 6), 4, 5, (1, 2), 17, 13, generator=torch.Generator().manual_seed(3)).eval()
    with torch.no_grad():
        model.mixing_bias.normal_(generator=torch.Generator().manual_seed(4))
        model.spatial_bias.normal_(generator=torch.Generator().manual_seed(5))
    readout = Readout.of_shared(model.to_weights("shared"))
    module = model.double()
    leaf = cl.recenter(small_images.double()).requires_grad_()
    responses = module(leaf)
    torch.testing.assert_close(
        readout.responses(small_images.float(), torch.arange(4), False).double(),
        responses.detach(),
        rtol=1e-4,
        atol=1e-4,
    )
    expected = torch.stack(
        [torch.autograd.grad(responses[:, n].sum(), leaf, retain_graph=True)[0] for n in range(4)], 1
    )
    maps = Saliency(readout).attribute(small_images)
    torch.testing.assert_close(maps.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    paired = Saliency(readout).attribute(small_images, pairs=[3, 2, 1, 0])
    assert torch.equal(paired, maps[range(4), [3, 2, 1, 0]])


def test_many_neurons_equal_one_at_a_time(resnet, pictures, small_bank, small_images):
    """A batch of K cotangents is K separate backward passes."""
    source = BankFeatures(small_bank, 2, 1)
    weights = torch.randn((6, *source.feature_shape()), generator=torch.Generator().manual_seed(0))
    whole = Saliency(Readout(source, weights)).attribute(small_images)
    for k in range(6):
        assert torch.equal(Saliency(Readout(source, weights[k : k + 1])).attribute(small_images)[:, 0], whole[:, k])
    whole = Saliency(resnet).attribute(pictures)
    for k in range(10):
        torch.testing.assert_close(Saliency(resnet).attribute(pictures, neurons=[k])[:, 0], whole[:, k])


def test_factors_are_their_products(small_bank, small_images):
    source = BankFeatures(small_bank, 0, 1)
    channels, height, width = source.feature_shape()
    draw = torch.Generator().manual_seed(0)
    masks, vectors = torch.randn(4, 2, height, width, generator=draw), torch.randn(4, 2, channels, generator=draw)

    class Factors:
        pass

    factors = Factors()
    factors.masks, factors.vectors = masks, vectors
    dense = Readout(source, torch.einsum("nrhw,nrc->nchw", masks, vectors))
    thin = Readout(source, factors)
    torch.testing.assert_close(
        Saliency(thin).attribute(small_images), Saliency(dense).attribute(small_images), rtol=1e-5, atol=1e-7
    )


def test_input_x_gradient(small_bank, small_images):
    maps = InputXGradient(small_bank).attribute(small_images)
    expected = Saliency(small_bank).attribute(small_images) * cl.recenter(small_images)[:, None]
    torch.testing.assert_close(maps, expected, rtol=1e-6, atol=1e-9)
    from_black = InputXGradient(small_bank, baseline=0).attribute(small_images, pairs=[0] * 4)
    expected = Saliency(small_bank).attribute(small_images, pairs=[0] * 4) * small_images
    torch.testing.assert_close(from_black, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_smoothgrad_is_what_its_noise_says(small_bank, small_images, kind):
    method = SmoothGrad(small_bank, samples=5, deviation=20.0, kind=kind, seed=3)
    gradients = torch.stack(
        [Saliency(small_bank).attribute(small_images + method.noise(s, 17, 13).float()).double() for s in range(5)]
    )
    expected = {
        "smoothgrad": gradients.mean(0),
        "smoothgrad_sq": gradients.square().mean(0),
        "vargrad": gradients.var(0, unbiased=False),
    }[kind]
    maps = method.attribute(small_images)
    torch.testing.assert_close(maps.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(method.attribute(small_images[2:]), maps[2:])
    other = SmoothGrad(small_bank, samples=5, deviation=20.0, kind=kind, seed=4).attribute(small_images)
    assert not torch.equal(other, maps)


def test_smoothgrad_noise_has_the_stated_deviation(small_bank):
    noise = torch.stack([SmoothGrad(small_bank, deviation=20.0).noise(s, 50, 50) for s in range(4)])
    assert abs(float(noise.mean())) < 0.5
    assert abs(float(noise.std()) - 20) < 0.5


@pytest.mark.parametrize("baseline", ["zero", "blur", 10.0, "image"])
@pytest.mark.parametrize("rule", ["gausslegendre", "midpoint"])
def test_integrated_gradients_are_complete(resnet, pictures, rule, baseline):
    """The sum of a map is the change of the response, the better the more steps; float64."""
    start = torch.from_numpy(pictures[::-1].copy()).double() if baseline == "image" else baseline
    images = pictures.astype(np.float64)
    errors = []
    for steps in (8, 128):
        method = IntegratedGradients(resnet, steps=steps, rule=rule, baseline=start)
        maps = method.attribute(images, neurons=[0, 3, 7])
        errors.append(method.convergence_delta(maps, images, neurons=[0, 3, 7]).abs().max())
    change = maps.flatten(2).sum(-1).abs().max()
    assert errors[1] < 0.05 * change  # the gradient has a jump at every ReLU and every maximum on the way
    assert errors[1] < errors[0]


def test_integrated_gradients_of_a_linear_network_are_complete_at_once(small_images):
    model = SharedCompactModel((4,), 3, 5, (1,), 17, 13, relu=False, generator=torch.Generator().manual_seed(0))
    source = ModuleFeatures(model.double().eval(), "trunk", preprocess=Preprocess.recentred((17, 13)))
    weights = torch.randn((2, *source.feature_shape()), generator=torch.Generator().manual_seed(1))
    method = IntegratedGradients(Readout(source, weights, torch.tensor([1.0, -2.0])), steps=1, baseline=20.0)
    maps = method.attribute(small_images)
    delta = method.convergence_delta(maps, small_images)
    torch.testing.assert_close(delta, torch.zeros_like(delta), rtol=0, atol=1e-9)


def test_convergence_delta_is_sum_minus_change(small_bank, small_images):
    method = IntegratedGradients(small_bank, steps=3, baseline=50)
    maps = method.attribute(small_images, pairs=[0, 1, 2, 0])
    end = cl.responses(small_images, small_bank)[range(4), [0, 1, 2, 0]]
    flat = torch.full_like(small_images, 50)
    begin = cl.responses(flat, small_bank)[range(4), [0, 1, 2, 0]]
    expected = maps.flatten(1).sum(1) - (end - begin)
    delta = method.convergence_delta(maps, small_images, pairs=[0, 1, 2, 0])
    torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="maps should be"):
        method.convergence_delta(maps, small_images)


def test_gauss_legendre_is_exact_where_the_gradient_is_linear():
    """A response that is quadratic in the image: two steps are enough, on any path."""
    nodes, weights = attribution.path_nodes(2, "gausslegendre")
    assert weights.sum() == pytest.approx(1)
    for power in range(4):
        assert (weights * nodes**power).sum() == pytest.approx(1 / (power + 1))
    nodes, weights = attribution.path_nodes(4, "midpoint")
    np.testing.assert_allclose(nodes, [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_allclose(weights, 0.25)


def test_nothing_to_attribute(small_bank, small_images):
    assert Saliency(small_bank).attribute(small_images[:0]).shape == (0, 3, 17, 13, 3)
    assert Saliency(small_bank).attribute(small_images, neurons=[]).shape == (4, 0, 17, 13, 3)
    assert IntegratedGradients(small_bank).attribute(small_images[:0], pairs=[]).shape == (0, 17, 13, 3)


def test_bad_arguments(small_bank, small_images):
    saliency = Saliency(small_bank)
    for options, kind, sentence in (
        ({"neurons": [3]}, ValueError, r"neurons should lie in 0\.\.2, got 3\.\.3"),
        ({"neurons": [-1]}, ValueError, "neurons should lie"),
        ({"pairs": [0]}, ValueError, "one neuron for each of the 4 images, got 1"),
        ({"neurons": [0.5]}, TypeError, "integers"),
        ({"neurons": [0], "pairs": [0] * 4}, ValueError, "not both"),
    ):
        with pytest.raises(kind, match=sentence):
            saliency.attribute(small_images, **options)
    with pytest.raises(ValueError, match="another input size"):
        saliency.attribute(small_images[:, :8])
    with pytest.raises(TypeError, match="ModelBank, or a Readout"):
        Saliency(SmallResNet())
    with pytest.raises(ValueError, match="bytes"):
        Saliency(small_bank, memory=0)
    with pytest.raises(ValueError, match="kind"):
        SmoothGrad(small_bank, kind="smooth")
    with pytest.raises(ValueError, match="samples"):
        SmoothGrad(small_bank, samples=0)
    with pytest.raises(ValueError, match="steps"):
        IntegratedGradients(small_bank, steps=0)
    with pytest.raises(ValueError, match="rule"):
        IntegratedGradients(small_bank, rule="trapezoid")
    with pytest.raises(ValueError, match="baseline should be"):
        IntegratedGradients(small_bank, baseline="black").attribute(small_images)
    with pytest.raises(ValueError, match="a baseline should be"):
        IntegratedGradients(small_bank, baseline=torch.zeros(3, 17, 13, 3)).attribute(small_images)
    source = BankFeatures(small_bank, 0, 1)
    with pytest.raises(ValueError, match="weights should be"):
        Readout(source, torch.zeros(2, 7, 9, 6))
    with pytest.raises(ValueError, match="NaN"):
        Readout(source, torch.full((2, 7, 9, 7), torch.nan))
    with pytest.raises(ValueError, match="give weights"):
        Readout(source)
    with pytest.raises(ValueError, match="bias"):
        Readout(source, torch.zeros(2, 7, 9, 7), torch.zeros(3))
    with pytest.raises(TypeError, match="masks and vectors"):
        Readout(source, [1.0])

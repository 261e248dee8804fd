"""Parallel backpropagation: identities, the search for references, and its variants."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import cortexloop as cl
from cortexloop.attribution import ParallelBackprop, Post
from cortexloop.features import BankFeatures, FeatureSource, ModuleFeatures, Preprocess
from cortexloop.testing import SmallResNet

N = 4


@pytest.fixture(params=["module", "bank"])
def source(request: pytest.FixtureRequest, small_bank: cl.ModelBank) -> FeatureSource:
    if request.param == "bank":
        return BankFeatures(small_bank, 2, 1)
    return ModuleFeatures(SmallResNet().double(), "layer2.0.bn2", preprocess=Preprocess.imagenet((17, 13)), batch=3)


@pytest.fixture
def weights(source: FeatureSource) -> Tensor:
    return torch.randn((N, *source.feature_shape()), generator=torch.Generator().manual_seed(0)).to(source.dtype)


@pytest.fixture
def images(rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.integers(0, 256, size=(3, 17, 13, 3), dtype=np.uint8))


@pytest.fixture
def gallery(rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.integers(0, 256, size=(7, 17, 13, 3), dtype=np.uint8))


def graph(source: FeatureSource, images: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf of float64 levels and the features."""
    leaf = images.double().requires_grad_()
    return leaf, source.differentiable(leaf)


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=1e-3, atol=1e-5 * max(1e-3, float(expected.abs().max()))
    )


def test_maps_are_gradients_of_half_the_weighted_squares(source, weights, images, gallery):
    """S = d/dx 1/2 sum w phi' phi(x)^2, and the same for the reference."""
    maps = ParallelBackprop(source, weights).attribute(images, gallery[:3])
    for n in range(N):
        for own, other, found in ((images, gallery[:3], maps.image), (gallery[:3], images, maps.reference)):
            leaf, phi = graph(source, own)
            fixed = source(other).double()
            half = 0.5 * (weights[n] * fixed * phi.square()).sum()
            near(found[:, n], torch.autograd.grad(half, leaf)[0])


def test_similarity_gradient(source, weights, images, gallery):
    pbp = ParallelBackprop(source, weights, cotangent="similarity_gradient")
    maps = pbp.attribute(images, gallery[:3])
    for n in range(N):
        first, phi = graph(source, images)
        second, other = graph(source, gallery[:3])
        similarity = (weights[n] * phi * other).flatten(1).sum(1)
        near(maps.similarity[:, n], similarity.detach())
        near(maps.image[:, n], torch.autograd.grad(similarity.sum(), first, retain_graph=True)[0])
        near(maps.reference[:, n], torch.autograd.grad(similarity.sum(), second)[0])


def test_minimum_and_positive_weights(source, weights, images, gallery):
    maps = ParallelBackprop(source, weights, cotangent="minimum", sign="positive").attribute(images, gallery[:3])
    leaf, phi = graph(source, images)
    shared = torch.minimum(phi.detach(), source(gallery[:3]).double())
    for n in range(N):
        expected = torch.autograd.grad((weights[n].relu() * shared * phi).sum(), leaf, retain_graph=True)[0]
        near(maps.image[:, n], expected)


def test_integrated_gradients_are_complete(source, weights, images, gallery):
    """The sum of a map is h . (phi(x) - phi(x0))."""
    pbp = ParallelBackprop(source, weights, method="integrated_gradients", steps=96, baseline=100.0)
    maps = pbp.attribute(images.double(), gallery[:3].double())
    features, other = source(images).double(), source(gallery[:3]).double()
    start = source(torch.full((1, 17, 13, 3), 100.0)).double()
    for n in range(N):
        h = weights[n] * features * other
        expected = (h * (features - start)).flatten(1).sum(1)
        total = maps.image[:, n].flatten(1).sum(1).double()
        assert (total - expected).abs().max() < 0.02 * expected.abs().max()


def test_input_times_gradient(source, weights, images, gallery):
    plain = ParallelBackprop(source, weights).attribute(images, gallery[:3])
    product = ParallelBackprop(source, weights, method="grad_x_input", baseline=7.0).attribute(images, gallery[:3])
    near(product.image, plain.image * (images - 7.0)[:, None])
    near(product.reference, plain.reference * (gallery[:3] - 7.0)[:, None])


def brute_force(source: FeatureSource, weights: Tensor, images: Tensor, gallery: Tensor, kind: str) -> np.ndarray:
    """[B, N, M] in float64, one number at a time."""
    phi, other = (source(x).double().flatten(1).numpy() for x in (images, gallery))
    w = weights.double().flatten(1).numpy()
    out = np.empty((len(phi), len(w), len(other)))
    for b, x in enumerate(phi):
        for n, wn in enumerate(w):
            for m, y in enumerate(other):
                if kind == "weighted":
                    out[b, n, m] = (wn * x * y).sum()
                elif kind == "cosine":
                    out[b, n, m] = (wn * x) @ (wn * y) / np.linalg.norm(wn * x) / np.linalg.norm(wn * y)
                else:
                    a = np.abs(wn)
                    out[b, n, m] = (a * x * y).sum() / np.sqrt((a * x * x).sum() * (a * y * y).sum())
    return out


@pytest.mark.parametrize("similarity", ["weighted", "cosine", "abs_cosine"])
def test_references_are_the_most_similar(source, weights, images, gallery, similarity):
    expected = brute_force(source, weights, images, gallery, similarity)
    pbp = ParallelBackprop(source, weights, similarity=similarity)
    found = pbp.find_references(images, iter([gallery[:1], gallery[1:5], gallery[5:]]), top=3)
    order = np.argsort(-expected, axis=2)[:, :, :3]
    np.testing.assert_array_equal(found.index.numpy(), order)
    np.testing.assert_allclose(found.similarity.numpy(), np.take_along_axis(expected, order, 2), rtol=1e-4, atol=1e-4)
    some = pbp.find_references(images, gallery, neurons=[3, 1])
    np.testing.assert_array_equal(some.index[:, :, 0].numpy(), order[:, [3, 1], 0])
    # the similarity of a pair is the one that it was found with
    maps = pbp.attribute(images, gallery, index=found.index[:, :, 0])
    torch.testing.assert_close(maps.similarity, found.similarity[:, :, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "abs_cosine"])
def test_an_image_is_most_similar_to_itself(source, weights, images, gallery, similarity):
    pbp = ParallelBackprop(source, weights, similarity=similarity)
    found = pbp.find_references(images, torch.cat([gallery, images]))
    assert torch.equal(found.index[:, :, 0], torch.arange(7, 10)[:, None].expand(3, N))
    torch.testing.assert_close(found.similarity, torch.ones_like(found.similarity), rtol=1e-5, atol=1e-5)
    others = pbp.find_references(images, torch.cat([gallery, images]), exclude=torch.arange(7, 10))
    assert (others.index[:, :, 0] != torch.arange(7, 10)[:, None]).all()


def test_equal_images_come_in_the_gallerys_order(source, weights, images, gallery):
    found = ParallelBackprop(source, weights).find_references(images, [gallery[:1], gallery[:1], gallery[:1]], top=2)
    assert torch.equal(found.index, torch.tensor([0, 1]).expand(3, N, 2))


def test_the_cotangent_sums_to_the_similarity(source, weights, images, gallery):
    """The default similarity and the default cotangent belong together."""
    maps = ParallelBackprop(source, weights).attribute(images, gallery[:3])
    h = weights[None] * (source(images) * source(gallery[:3]))[:, None]
    near(maps.similarity, h.flatten(2).sum(2))


def test_neuron_specific_references(source, weights, images, gallery):
    pbp = ParallelBackprop(source, weights)
    index = torch.tensor([[0, 1, 2, 3], [3, 3, 6, 0], [5, 4, 3, 3]])
    maps = pbp.attribute(images, gallery, index=index)
    for b in range(3):
        for n in range(N):
            alone = pbp.attribute(images[b : b + 1], gallery[index[b, n]][None], neurons=[n])
            near(maps.image[b, n], alone.image[0, 0])
            near(maps.reference[b, n], alone.reference[0, 0])
            near(maps.similarity[b, n], alone.similarity[0, 0])


def test_memory_changes_nothing_but_the_chunks(source, weights, images, gallery):
    index = torch.tensor([[0, 1, 2, 3], [3, 3, 6, 0], [5, 3, 3, 3]])
    wide = ParallelBackprop(source, weights)
    per_image, per_pair = wide.target.memory(17, 13)
    narrow = ParallelBackprop(source, weights, memory=per_image + 3 * per_pair)
    first, second = (p.attribute(images, gallery, index=index) for p in (wide, narrow))
    near(second.image, first.image)
    near(second.reference, first.reference)
    with pytest.raises(ValueError, match="allow more"):
        ParallelBackprop(source, weights, memory=1000).attribute(images, gallery, index=index)


def test_post_is_applied_to_each_map(source, weights, images, gallery):
    plain = ParallelBackprop(source, weights).attribute(images, gallery[:3])
    post = Post(rectify="abs", channels="sum", blur=1.0, normalise=True)
    maps = ParallelBackprop(source, weights, post=post).attribute(images, gallery[:3])
    assert maps.image.shape == maps.reference.shape == (3, N, 17, 13)
    near(maps.image, post(plain.image))
    near(maps.reference, post(plain.reference))


def test_factors(small_bank, images, gallery):
    source = BankFeatures(small_bank, 2, 1)
    channels, height, width = source.feature_shape()
    draw = torch.Generator().manual_seed(1)

    class Factors:
        masks = torch.randn(N, 2, height, width, generator=draw)
        vectors = torch.randn(N, 2, channels, generator=draw)

    dense = ParallelBackprop(source, torch.einsum("nrhw,nrc->nchw", Factors.masks, Factors.vectors))
    thin = ParallelBackprop(source, Factors)
    near(thin.attribute(images, gallery[:3]).image, dense.attribute(images, gallery[:3]).image)


def test_what_is_not_defined_is_refused(small_bank, images, gallery):
    source = BankFeatures(small_bank, 2, 1)
    dead = torch.zeros((2, *source.feature_shape()))
    dead[1] = 1
    with pytest.raises(ValueError, match="image 0 has no feature that 1 of the neurons read"):
        ParallelBackprop(source, dead, similarity="cosine").find_references(images, gallery)
    with pytest.raises(ValueError, match="the gallery of 2 images has fewer than 3"):
        ParallelBackprop(source, dead).find_references(images, gallery[:2], top=3)


def test_bad_arguments(source, weights, images, gallery):
    for option, value in (("cotangent", "product"), ("similarity", "dot"), ("sign", "plus"), ("method", "ig")):
        with pytest.raises(ValueError, match=f"{option} should be one of"):
            ParallelBackprop(source, weights, **{option: value})
    pbp = ParallelBackprop(source, weights)
    with pytest.raises(ValueError, match="one for each of 3 images, got 7"):
        pbp.attribute(images, gallery)
    with pytest.raises(ValueError, match=r"index should be integers \[3, 4\]"):
        pbp.attribute(images, gallery, index=torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"index should lie in the gallery, 0\.\.6"):
        pbp.attribute(images, gallery, index=torch.full((3, N), 7))
    with pytest.raises(ValueError, match="top should be"):
        pbp.find_references(images, gallery, top=0)
    with pytest.raises(ValueError, match="exclude should hold"):
        pbp.find_references(images, gallery, exclude=torch.zeros(2, dtype=torch.int64))

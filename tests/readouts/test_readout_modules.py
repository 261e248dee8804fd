"""Readout modules: definitions, constraints without in-place changes, sampling, regularisers, state dicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cortexloop as cl
from cortexloop.models import SharedCompactModel
from cortexloop.readouts import (
    DenseReadout,
    EluPlusOne,
    FactorizedReadout,
    GaussianReadout,
    PointPooledReadout,
    Readout,
)

SHAPE, NEURONS = (5, 6, 7), 11
MAKERS: dict[str, Callable[..., Readout]] = {
    "factorized": lambda **o: FactorizedReadout(SHAPE, NEURONS, rank=2, **o),
    "normalized": lambda **o: FactorizedReadout(SHAPE, NEURONS, normalize_masks=True, positive_masks=True, **o),
    "gaussian": lambda **o: GaussianReadout(SHAPE, NEURONS, **o),
    "uncorrelated": lambda **o: GaussianReadout(SHAPE, NEURONS, covariance="uncorrelated", **o),
    "isotropic": lambda **o: GaussianReadout(SHAPE, NEURONS, covariance="isotropic", **o),
    "pooled": lambda **o: PointPooledReadout(SHAPE, NEURONS, pool_steps=2, **o),
    "dense": lambda **o: DenseReadout(SHAPE, NEURONS, **o),
}
makers = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture
def features() -> Tensor:
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(3))


def scattered(readout: Readout, seed: int = 0) -> Readout:
    """All parameters N(0, 1): out of every range, so that constraints matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in readout.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return readout


@makers
@pytest.mark.parametrize("bias", [True, False])
def test_shapes_and_names(name: str, bias: bool, features: Tensor):
    readout = MAKERS[name](bias=bias).eval()
    assert readout(features).shape == (3, NEURONS)
    assert readout(features[:0]).shape == (0, NEURONS)
    expected = {
        "factorized": {"masks", "vectors"},
        "normalized": {"masks", "vectors"},
        "pooled": {"positions", "vectors"},
        "dense": {"weight"},
    }.get(name, {"mu", "sigma", "vectors"})
    assert set(readout.state_dict()) == expected | ({"bias"} if bias else set())
    assert f"5 x 6 x 7 -> {NEURONS}, bias={bias}" in repr(readout)


@makers
def test_state_dict_round_trip(name: str, features: Tensor):
    one, two = scattered(MAKERS[name]()).eval(), MAKERS[name]().eval()
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(features), two(features))


@makers
def test_forward_changes_no_parameter(name: str, features: Tensor):
    readout = scattered(MAKERS[name]())
    before = {key: value.clone() for key, value in readout.state_dict().items()}
    versions = {key: value._version for key, value in readout.named_parameters()}
    for mode in (True, False):
        readout.train(mode)(features).sum().backward()
        readout.regularizer().backward()
    assert all(torch.equal(value, before[key]) for key, value in readout.state_dict().items())
    assert {key: value._version for key, value in readout.named_parameters()} == versions
    assert all(p.grad is not None and p.grad.isfinite().all() for p in readout.parameters())


@makers
def test_generators_decide_everything(name: str):
    one, two = (MAKERS[name](generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    state = torch.random.get_rng_state()
    one.initialize(generator=torch.Generator().manual_seed(6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@makers
def test_bias_starts_at_the_mean_activity(name: str):
    readout = MAKERS[name]()
    mean = torch.arange(NEURONS).float()
    readout.initialize(mean)
    assert torch.equal(readout.bias, mean)
    readout.initialize()
    assert not readout.bias.any()
    with pytest.raises(ValueError, match=r"mean_activity should be \[11\], finite, got \[3\]"):
        readout.initialize(mean[:3])
    with pytest.raises(ValueError, match="this readout has none"):
        MAKERS[name](bias=False).initialize(mean)


@makers
def test_reductions_of_the_regularizer(name: str):
    readout = scattered(MAKERS[name](l1_weight=0.5))
    each = readout.regularizer("none")
    assert each.shape == (NEURONS,)
    torch.testing.assert_close(readout.regularizer("sum"), each.sum())
    torch.testing.assert_close(readout.regularizer("mean") * readout.penalized(), each.sum())
    with pytest.raises(ValueError, match="reduction should be one of 'sum', 'mean', 'none', got 'max'"):
        readout.regularizer("max")


@makers
def test_weights_of_regularizers_are_not_ignored(name: str):
    """Each option ending in _weight scales its part, and 0 turns it off."""
    options = [key for key in vars(MAKERS[name]()) if key.endswith("_weight")]
    assert "l1_weight" in options
    off = dict.fromkeys(options, 0.0)
    assert not scattered(MAKERS[name](**off)).regularizer()
    for option in options:
        one, three = (float(scattered(MAKERS[name](**{**off, option: w})).regularizer().detach()) for w in (1.0, 3.0))
        assert three == pytest.approx(3 * one)
        assert one > 0
        with pytest.raises(ValueError, match=f"{option} should be a finite number of at least 0, got -1"):
            MAKERS[name](**{option: -1})


def test_factorized_definition(features: Tensor):
    readout = scattered(FactorizedReadout(SHAPE, NEURONS, rank=3)).double()
    weights = torch.einsum("trc,trhw->tchw", readout.vectors, readout.masks)
    torch.testing.assert_close(readout.weights(), weights)
    with cl.use_backend("reference"):
        got = readout(features.double())
    torch.testing.assert_close(got, torch.einsum("bchw,tchw->bt", features.double(), weights) + readout.bias)


def test_smoothness_and_l2_of_factors():
    readout = FactorizedReadout(
        SHAPE, 2, rank=1, l1_weight=0, smoothness_weight=2.0, mask_l2_weight=3.0, vector_l2_weight=5.0
    )
    with torch.no_grad():
        readout.masks.zero_()
        readout.masks[0, 0, 2, 3] = 1
        readout.masks[1, 0, 0, 0] = 2
        readout.vectors.fill_(1)
    # One pixel inside: 16 + 4 neighbours of 1; one in a corner, twice as large: 4 * (16 + 2).
    assert readout.regularizer("none").tolist() == [2 * 20 + 3 + 25, 2 * 72 + 12 + 25]


def test_normalised_masks_have_norm_one():
    masks = scattered(FactorizedReadout(SHAPE, NEURONS, rank=2, normalize_masks=True)).masks_in_force()
    torch.testing.assert_close(masks.square().sum((2, 3)), torch.ones(NEURONS, 2), rtol=1e-4, atol=0)


def test_positive_factors_come_back(features: Tensor):
    """A mask below 0 acts as 0, still gets a gradient, and after `project` is 0."""
    readout = scattered(FactorizedReadout(SHAPE, NEURONS, positive_masks=True, positive_vectors=True))
    assert (readout.masks < 0).any()
    assert torch.equal(readout.masks_in_force(), readout.masks.clamp_min(0))
    assert torch.equal(readout.vectors_in_force(), readout.vectors.clamp_min(0))
    response = readout(features)
    response.square().sum().backward()
    assert readout.masks.grad[readout.masks < 0].abs().min() > 0
    readout.project()
    assert readout.masks.min() == 0
    assert readout.vectors.min() == 0
    assert torch.equal(readout(features), response)
    assert FactorizedReadout(SHAPE, NEURONS, positive_masks=True).masks.min() >= 0


def test_dense_definition(features: Tensor):
    readout = scattered(DenseReadout(SHAPE, NEURONS))
    expected = torch.einsum("bchw,tchw->bt", features, readout.weight) + readout.bias
    torch.testing.assert_close(readout(features), expected, rtol=1e-5, atol=1e-4)


def sampled(features: Tensor, positions: Tensor, align_corners: bool = True) -> Tensor:
    """[B, C, T], by torch's own function."""
    grid = positions.expand(len(features), -1, -1)[:, :, None]
    return F.grid_sample(features, grid, align_corners=align_corners)[..., 0]


@pytest.mark.parametrize("align_corners", [True, False])
def test_gaussian_in_evaluation(features: Tensor, align_corners: bool):
    readout = scattered(GaussianReadout(SHAPE, NEURONS, align_corners=align_corners)).eval()
    assert (readout.mu.abs() > 1).any()
    inside = readout.mu.clamp(-1, 1)
    expected = torch.einsum("bct,tc->bt", sampled(features, inside, align_corners), readout.vectors) + readout.bias
    torch.testing.assert_close(readout(features), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(readout(features), readout(features))
    shift = torch.tensor([[0.0, 0], [0.5, -0.25], [-3, 0]])
    moved = sampled(features, inside + shift[:, None], align_corners)
    expected = torch.einsum("bct,tc->bt", moved, readout.vectors) + readout.bias
    torch.testing.assert_close(readout(features, shift=shift), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(readout(features, shift=shift)[2], readout.bias) or inside[:, 0].max() > 2


@pytest.mark.parametrize("covariance", ["isotropic", "uncorrelated", "full"])
def test_gaussian_sampling(features: Tensor, covariance: str):
    """Positions have the Gaussian's moments, lie in the map, and follow from the generator."""
    readout = GaussianReadout(SHAPE, 3, covariance=covariance, init_sigma=0.1)
    with torch.no_grad():
        if covariance == "full":
            readout.sigma.copy_(torch.tensor([[0.1, 0.05], [-0.02, 0.07]]))
    drawn = readout.sample_positions(20000, torch.Generator().manual_seed(1)).detach()
    assert drawn.shape == (20000, 3, 2)
    torch.testing.assert_close(drawn.mean(0), readout.mu.detach(), rtol=0, atol=5e-3)
    root = readout.sigma[0].detach()
    root = root if covariance == "full" else torch.diag(root.expand(2))
    torch.testing.assert_close(torch.cov(drawn[:, 0].T), root @ root.T, rtol=0, atol=5e-4)
    one, two, other = (readout(features, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(readout(features, sample=False), readout.eval()(features))
    wide = GaussianReadout(SHAPE, 50, init_sigma=5.0)
    assert float(wide.sample_positions(10).detach().abs().max()) == 1


def test_gaussian_sampling_per_batch(features: Tensor):
    readout = GaussianReadout(SHAPE, NEURONS, sample_per_image=False, init_sigma=0.3)
    same = features[:1].expand(4, -1, -1, -1)
    response = readout(same)
    assert torch.equal(response, response[:1].expand(4, -1))
    readout.sample_per_image = True
    assert not torch.equal(readout(same)[0], readout(same)[1])


@pytest.mark.parametrize("name", ["gaussian", "pooled"])
def test_some_neurons_only(name: str, features: Tensor):
    readout = scattered(MAKERS[name]()).eval()
    whole = readout(features)
    assert torch.equal(readout(features, neurons=[4, 0, 4]), whole[:, [4, 0, 4]])
    mask = torch.arange(NEURONS) % 2 == 0
    assert torch.equal(readout(features, neurons=mask), whole[:, mask])
    assert readout(features, neurons=[]).shape == (3, 0)
    with pytest.raises(ValueError, match=r"neurons should lie in 0\.\.10"):
        readout(features, neurons=[11])
    with pytest.raises(TypeError, match="neurons should be a list of integers"):
        readout(features, neurons=[0.5])


def test_positions_outside_come_back(features: Tensor):
    """A mean outside acts as the nearest point inside, and gets that point's gradient."""
    outside, edge = (GaussianReadout(SHAPE, NEURONS).eval() for _ in range(2))
    scattered(outside)
    edge.load_state_dict(outside.state_dict())
    edge.project()
    assert float(edge.mu.detach().abs().max()) == 1
    for readout in (outside, edge):
        readout(features).square().sum().backward()
    assert torch.equal(outside.mu.grad, edge.mu.grad)
    assert outside.mu.grad[outside.mu.abs() > 1].any()


def test_point_pooled_definition(features: Tensor):
    readout = scattered(PointPooledReadout(SHAPE, NEURONS, pool_steps=2)).eval()
    maps, expected = features, readout.bias
    for step in range(3):
        maps = maps if step == 0 else F.avg_pool2d(maps, 2)
        read = sampled(maps, readout.positions.clamp(-1, 1))
        expected = expected + torch.einsum("bct,tc->bt", read, readout.vectors[:, step])
    torch.testing.assert_close(readout(features), expected, rtol=1e-5, atol=1e-5)


@makers
def test_gradients_by_every_parameter(name: str, features: Tensor):
    """Of a compiled forward pass, too: no graph breaks, the same bits."""
    plain = scattered(MAKERS[name]()).eval()
    compiled = scattered(MAKERS[name]()).eval()
    torch._dynamo.reset()
    for readout, forward in ((plain, plain), (compiled, torch.compile(compiled, backend="aot_eager", fullgraph=True))):
        (forward(features).sin().sum() + readout.regularizer()).backward()
    for one, two in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        if one.grad is not None and two.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-6, atol=1e-6)


def test_output_nonlinearity():
    y = torch.tensor([-3.0, 0.0, 2.0])
    assert torch.equal(EluPlusOne()(y), F.elu(y) + 1)
    assert torch.equal(EluPlusOne(-1)(y), F.elu(y - 1) + 1)
    model = nn.Sequential(FactorizedReadout(SHAPE, 4), EluPlusOne(-1))
    assert float(model(torch.randn(2, *SHAPE)).detach().min()) > 0
    assert "offset=-1" in repr(model)


@pytest.mark.parametrize("name", ["synthetic", "published"])
def test_readout_of_a_shared_compact_model(request: pytest.FixtureRequest, name: str):
    if name == "published":
        data: Path = request.getfixturevalue("v4_data")
        weights = cl.io.load_shared(data / "shared_compact_models.npz")[0]
    else:
        generator = torch.Generator().manual_seed(0)
        model = SharedCompactModel((4, 5, 6), 9, strides=(1, 2, 1), height=16, width=20, generator=generator)
        with torch.no_grad():
            model.mixing_bias.normal_(generator=torch.Generator().manual_seed(1))
            model.spatial_bias.normal_(generator=torch.Generator().manual_seed(2))
        weights = model.to_weights("shared")
    shared = SharedCompactModel.from_weights(weights)
    readout = FactorizedReadout.from_shared(weights)
    images = torch.randn(2, weights.height, weights.width, 3, generator=torch.Generator().manual_seed(3)) * 50
    with torch.no_grad():
        features = shared.trunk(images)
        torch.testing.assert_close(readout(features), shared(images), rtol=1e-5, atol=1e-5)
        exact = shared.double()(images.double())
        with cl.use_backend("reference"):
            got = readout.double()(shared.trunk(images.double()))
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)  # the one bias is a float32 number


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: FactorizedReadout((5, 6), 3), r"in_shape should be \(C, H, W\)"),
    (lambda: FactorizedReadout(SHAPE, 0), "neurons should be at least 1"),
    (lambda: FactorizedReadout(SHAPE, 3, rank=0), "rank should be at least 1"),
    (lambda: GaussianReadout(SHAPE, 3, covariance="diagonal"), "covariance should be one of 'isotropic'"),
    (lambda: GaussianReadout(SHAPE, 3, init_mu_range=1.5), "init_mu_range should be at most 1"),
    (lambda: GaussianReadout(SHAPE, 3, init_sigma=0), "init_sigma should be a finite number above 0"),
    (lambda: PointPooledReadout(SHAPE, 3, pool_steps=3), "cannot be pooled 3 times by 2 x 2"),
    (lambda: PointPooledReadout(SHAPE, 3, kernel=1), "kernel at least 2"),
    (lambda: DenseReadout(SHAPE, 3)(torch.ones(2, 5, 7, 6)), r"features should be \[B, 5, 6, 7\], got \[2, 5, 7, 6\]"),
    (lambda: GaussianReadout(SHAPE, 3)(torch.ones(2, *SHAPE), shift=torch.ones(2)), r"shift should be \[2, 2\]"),
]


@pytest.mark.parametrize(("make", "match"), BAD)
def test_bad_options_get_one_sentence(make: Callable[[], Any], match: str):
    with pytest.raises(ValueError, match=match):
        make()


def test_training_finds_a_neuron():
    """A Gaussian readout with sampling finds where and what a neuron looks at, from its responses."""
    generator = torch.Generator().manual_seed(0)
    maps = F.avg_pool2d(torch.randn(256, 2, 17, 17, generator=generator), 3, stride=1)
    target = 3 * maps[:, 1, 4, 10]
    readout = GaussianReadout((2, 15, 15), 1, covariance="isotropic", init_sigma=0.4, l1_weight=0, generator=generator)
    optimiser = torch.optim.Adam(readout.parameters(), lr=0.02)
    for _ in range(300):
        optimiser.zero_grad()
        (readout(maps, generator=generator)[:, 0] - target).square().mean().backward()
        optimiser.step()
        readout.project()
    where = (readout.mu[0].detach().numpy() + 1) / 2 * 14
    np.testing.assert_allclose(where, [10, 4], atol=0.3)

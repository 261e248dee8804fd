"""The same outputs, gradients and regularisers as neuralpredictors' readouts on the same weights."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cortexloop as cl
from cortexloop.readouts import FactorizedReadout, GaussianReadout, PointPooledReadout, Readout

with warnings.catch_warnings():  # what the package and its dependencies say on import is not ours to judge
    warnings.simplefilter("ignore")
    from neuralpredictors.layers import readouts as published

pytestmark = [
    pytest.mark.filterwarnings("ignore:Readout is NOT initialized with mean activity"),
    pytest.mark.filterwarnings("ignore:redundant pooling steps"),
]

SHAPE, NEURONS = (6, 9, 12), 13
GAUSS_TYPES = ("isotropic", "uncorrelated", "full")


def scatter(module: torch.nn.Module) -> Any:
    """Parameters in float64, N(0, 0.7^2): some positions lie outside of the map."""
    generator = torch.Generator().manual_seed(7)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def maps(batch: int = 4) -> Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def compare(ours: Readout, theirs: Any, pairs: dict[str, str], **call: Any) -> None:
    """Outputs, and gradients by the features and by parameters: ours -> theirs, each the other's after reshaping."""
    results = []
    for readout in (ours, theirs):
        features = maps().requires_grad_()
        torch.manual_seed(11)  # sampling
        with cl.use_backend("reference"):
            response = readout(features, **call)
            response.sin().sum().backward()
        results.append((response, features.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-12, atol=1e-12)
    own, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for mine, name in pairs.items():
        expected = other[name].grad
        got = own[mine].grad
        assert got is not None, mine
        if mine == "vectors" and expected.shape[0] == 1:
            expected = expected[0, :, 0].T  # [1, C, 1, T]
        torch.testing.assert_close(got.flatten(), expected.flatten(), rtol=1e-11, atol=1e-12, msg=mine)


def compare_regularizers(ours: Readout, theirs: Any, pairs: dict[str, str]) -> None:
    for reduction in ("sum", "mean"):
        one, two = ours.regularizer(reduction), theirs.regularizer(reduction=reduction)
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
    for mine, name in pairs.items():
        (got,) = torch.autograd.grad(ours.regularizer(), dict(ours.named_parameters())[mine])
        (expected,) = torch.autograd.grad(theirs.regularizer(), dict(theirs.named_parameters())[name])
        if mine == "vectors" and expected.shape[0] == 1:
            expected = expected[0, :, 0].T
        torch.testing.assert_close(got.flatten(), expected.flatten(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("constrain_pos", [True, False])
def test_full_factorized(bias: bool, normalize: bool, constrain_pos: bool):
    options = {"normalize": normalize, "constrain_pos": constrain_pos}
    theirs = scatter(published.FullFactorized2d(SHAPE, NEURONS, bias, spatial_and_feature_reg_weight=0.3, **options))
    ours = FactorizedReadout.from_neuralpredictors(theirs.state_dict(), l1_weight=0.3, **options)
    assert ours.masks.dtype == torch.float64
    pairs = {"masks": "spatial", "vectors": "_features", **({"bias": "bias"} if bias else {})}
    compare(ours, theirs, pairs)
    ours.project()  # theirs have done so to their own parameters in the forward pass
    compare_regularizers(ours, theirs, {"masks": "spatial"})


@pytest.mark.parametrize("gauss_type", GAUSS_TYPES)
@pytest.mark.parametrize("align_corners", [True, False])
def test_full_gaussian_in_evaluation(gauss_type: str, align_corners: bool):
    theirs = scatter(
        published.FullGaussian2d(
            SHAPE, NEURONS, True, gauss_type=gauss_type, align_corners=align_corners, feature_reg_weight=0.7
        )
    ).eval()
    assert (theirs._mu.abs() > 1).any()
    state = {f"readout.session.{key}": value.clone() for key, value in theirs.state_dict().items()}
    ours = GaussianReadout.from_neuralpredictors(
        state, SHAPE, prefix="readout.session.", align_corners=align_corners, l1_weight=0.7
    ).eval()
    assert ours.covariance == gauss_type
    pairs = {"mu": "_mu", "vectors": "_features", "bias": "bias"}
    compare(ours, theirs, pairs)
    compare(ours.requires_grad_(), theirs, {}, shift=torch.tensor([[0.1, 0], [0, 0.2], [-0.5, 0.5], [2, 0]]).double())
    compare_regularizers(ours, theirs, {"vectors": "_features"})


@pytest.mark.parametrize("gauss_type", GAUSS_TYPES)
@pytest.mark.parametrize("per_image", [True, False])
def test_full_gaussian_in_training(gauss_type: str, per_image: bool):
    """The same noise: both draw [B, T, 2] normal numbers, in one order."""
    theirs = scatter(published.FullGaussian2d(SHAPE, NEURONS, True, gauss_type=gauss_type, batch_sample=per_image))
    ours = GaussianReadout.from_neuralpredictors(
        {key: value.clone() for key, value in theirs.state_dict().items()}, SHAPE, sample_per_image=per_image
    )
    compare(ours.train(), theirs.train(), {"mu": "_mu", "sigma": "sigma", "vectors": "_features", "bias": "bias"})


def test_some_neurons_of_a_gaussian():
    theirs = scatter(published.FullGaussian2d(SHAPE, NEURONS, True)).eval()
    ours = GaussianReadout.from_neuralpredictors(theirs.state_dict(), SHAPE).eval()
    index = np.array([3, 1, 12])
    with cl.use_backend("reference"):
        torch.testing.assert_close(ours(maps(), neurons=index), theirs(maps(), out_idx=index), rtol=1e-12, atol=1e-12)


def test_shared_features_and_positions_are_spread_out():
    ids = np.array([2, 0, 0, 1, 2, 1, 0, 3, 3, 3, 1, 1, 0])
    sharing = {"match_ids": ids, "shared_features": None}
    theirs = scatter(
        published.FullGaussian2d(
            SHAPE, NEURONS, True, shared_features=sharing, shared_grid={"match_ids": ids, "shared_grid": None}
        )
    ).eval()
    with torch.no_grad():
        theirs._mu.clamp_(-1, 1)
    ours = GaussianReadout.from_neuralpredictors(theirs.state_dict(), SHAPE).eval()
    with cl.use_backend("reference"):
        torch.testing.assert_close(ours(maps()), theirs(maps()), rtol=1e-12, atol=1e-12)
    factorized = scatter(published.FullFactorized2d(SHAPE, NEURONS, True, shared_features=sharing))
    ours = FactorizedReadout.from_neuralpredictors(factorized.state_dict())
    with cl.use_backend("reference"):
        torch.testing.assert_close(ours(maps()), factorized(maps()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("pool_steps", "kernel"), [(0, 2), (1, 2), (3, 2), (1, 3)])
@pytest.mark.parametrize("align_corners", [True, False])
def test_point_pooled(pool_steps: int, kernel: int, align_corners: bool):
    theirs = scatter(
        published.PointPooled2d(
            list(SHAPE), NEURONS, pool_steps, True, kernel, 0.1, align_corners=align_corners, feature_reg_weight=0.2
        )
    )
    ours = PointPooledReadout.from_neuralpredictors(
        {key: value.clone() for key, value in theirs.state_dict().items()},
        SHAPE,
        kernel=kernel,
        align_corners=align_corners,
        l1_weight=0.2,
    )
    assert ours.pool_steps == pool_steps
    compare(ours, theirs, {"positions": "grid", "vectors": "features", "bias": "bias"})
    compare_regularizers(ours, theirs, {"vectors": "features"})


@pytest.mark.parametrize("engine_name", ["cpu"])
def test_float32_kernels_against_their_float64(kernels: None, engine_name: str):
    theirs = scatter(published.FullGaussian2d(SHAPE, NEURONS, True)).eval()
    ours = GaussianReadout.from_neuralpredictors(theirs.state_dict(), SHAPE).eval().float()
    with cl.use_backend(engine_name):
        got = ours(maps().float())
    torch.testing.assert_close(got.double(), theirs(maps()), rtol=1e-4, atol=1e-4)


def test_wrong_state_dicts_are_refused():
    theirs = published.FullGaussian2d(SHAPE, NEURONS, True)
    state = dict(theirs.state_dict())
    with pytest.raises(ValueError, match=r"should have 'x\.sigma'"):
        GaussianReadout.from_neuralpredictors(state, SHAPE, prefix="x.")
    with pytest.raises(ValueError, match=r"nothing here corresponds to \['extra'\]"):
        GaussianReadout.from_neuralpredictors({**state, "extra": torch.ones(1)}, SHAPE)
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        GaussianReadout.from_neuralpredictors({**state, "sigma": state["sigma"] * torch.nan}, SHAPE)
    with pytest.raises(ValueError, match=r"vectors should be \[13, 5\], got \[13, 6\]"):
        GaussianReadout.from_neuralpredictors(state, (5, 9, 12))
    predicted = published.FullGaussian2d(
        SHAPE,
        NEURONS,
        True,
        grid_mean_predictor={"hidden_layers": 0, "hidden_features": 20, "final_tanh": False},
        source_grid=np.random.default_rng(0).standard_normal((NEURONS, 2)),
    )
    with pytest.raises(ValueError, match="'_mu'"):
        GaussianReadout.from_neuralpredictors(predicted.state_dict(), SHAPE)

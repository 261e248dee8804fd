"""Principal components against scikit-learn; random projections against what they promise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as PeerPCA  # noqa: N811
from sklearn.random_projection import johnson_lindenstrauss_min_dim

from cortexloop.regression import PCA, SparseRandomProjection, johnson_lindenstrauss

SHAPES = [(30, 200), (60, 61), (200, 30)]


def features(n: int, p: int, seed: int = 0) -> np.ndarray:
    """Spectrum that falls, an offset a thousand times the smallest deviations, a constant feature."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)) @ np.diag(1 / np.arange(1, p + 1)) @ np.linalg.qr(rng.standard_normal((p, p)))[0]
    x = x + 5
    x[:, 1] = 0.1
    return x


def up_to_signs(got: Any, expected: Any) -> Any:
    """`got` with the sign of each row as in `expected`."""
    got, expected = np.asarray(got), np.asarray(expected)
    return got * np.sign((got * expected).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("axes", ["materialised", "dual"])
@pytest.mark.parametrize("shape", SHAPES)
def test_components_are_scikit_learns(shape: tuple[int, int], axes: Any):
    x = features(*shape)
    peer = PeerPCA(10, svd_solver="full").fit(x)
    pca = PCA(10, axes=axes).fit(x)
    assert pca.dual == (axes == "dual" and shape[0] <= shape[1])
    assert pca.images == shape[0]
    np.testing.assert_allclose(pca.mean, peer.mean_, rtol=1e-13)
    np.testing.assert_allclose(pca.variances, peer.explained_variance_, rtol=1e-9)
    np.testing.assert_allclose(pca.ratios, peer.explained_variance_ratio_, rtol=1e-9)
    np.testing.assert_allclose(up_to_signs(pca.axes(), peer.components_), peer.components_, atol=1e-7)
    torch.testing.assert_close(pca.axes() @ pca.axes().T, torch.eye(10).double(), rtol=0, atol=1e-9)
    fresh = features(7, shape[1], seed=1)
    expected = peer.transform(fresh).T
    np.testing.assert_allclose(up_to_signs(pca.transform(fresh).T, expected), expected, atol=1e-7)
    np.testing.assert_allclose(pca.inverse(pca.transform(fresh)), peer.inverse_transform(expected.T), atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_batches_and_dtype_change_little(shape: tuple[int, int]):
    x = torch.from_numpy(features(*shape)).float()

    def batches() -> Iterator[torch.Tensor]:
        yield from x.split((11, *(len(x) - 11,)))

    whole, parts = PCA(5).fit(x), PCA(5).fit(batches())
    for a, b in ((whole.variances, parts.variances), (whole.axes(), parts.axes()), (whole.mean, parts.mean)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    exact = PCA(5).fit(x.double())
    torch.testing.assert_close(whole.variances, exact.variances, rtol=1e-9, atol=0)
    assert whole.transform(x).dtype == torch.float32
    torch.testing.assert_close(whole.transform(x).double(), exact.transform(x.double()), rtol=0, atol=1e-5)
    one_by_one = torch.cat([whole.transform(row[None]) for row in x[:4]])
    torch.testing.assert_close(one_by_one, whole.transform(x)[:4], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_centring_axes_are_those_of_the_second_moment(shape: tuple[int, int]):
    x = features(*shape)
    pca = PCA(3, centre=False).fit(x)
    _, singular, rows = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(pca.variances, singular[:3] ** 2 / (len(x) - 1), rtol=1e-9)
    np.testing.assert_allclose(up_to_signs(pca.axes(), rows[:3]), rows[:3], atol=1e-7)
    assert not pca.mean.any()


def test_signs_do_not_depend_on_the_sign_of_the_solver():
    """The largest share of an image, or of a feature, in an axis is positive."""
    dual = PCA(4).fit(features(20, 50))
    shares = dual.transform(features(20, 50))
    assert (shares.gather(0, shares.abs().argmax(dim=0, keepdim=True)) > 0).all()
    primal = PCA(4).fit(features(50, 20)).axes()
    assert (primal.gather(1, primal.abs().argmax(dim=1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("axes", ["materialised", "dual"])
def test_saved_components_are_the_same(axes: Any):
    x = features(20, 50)
    pca = PCA(4, axes=axes).fit(x)
    again = PCA.from_tensors(pca.tensors())
    torch.testing.assert_close(again.transform(x), pca.transform(x), rtol=0, atol=1e-12)
    assert again.images == 20
    with pytest.raises(ValueError, match="mean missing"):
        PCA.from_tensors({k: v for k, v in pca.tensors().items() if k != "mean"})


def test_components_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="20 components of 20 images with 50 features; at most 19 exist"):
        PCA(20).fit(features(20, 50))
    rank_three = np.random.default_rng(0).standard_normal((20, 3)) @ np.ones((3, 50))
    with pytest.raises(ValueError, match=r"vary in 1 directions, fewer than the 2 components wanted; use PCA\(1\)"):
        PCA(2).fit(rank_three)
    with pytest.raises(RuntimeError, match="have not been fitted"):
        PCA(2).transform(rank_three)
    with pytest.raises(ValueError, match=r"features should be \[images, 50\], got \[3, 49\]"):
        PCA(1).fit(rank_three).transform(np.zeros((3, 49)))
    with pytest.raises(ValueError, match="batches should all have 5 features, got one of 4"):
        PCA(1).fit([np.eye(5), np.eye(4)])
    with pytest.raises(ValueError, match="no batch"):
        PCA(1).fit([])
    with pytest.raises(ValueError, match="components should be at least 1"):
        PCA(0)


# ---- random projections


def test_number_of_components_is_scikit_learns():
    for n, eps in ((3000, 0.1), (100, 0.5), (10**6, 0.2)):
        assert johnson_lindenstrauss(n, eps) == johnson_lindenstrauss_min_dim(n, eps=eps)
    assert SparseRandomProjection(images=3000).components == 6862
    with pytest.raises(ValueError, match="needs the number of images"):
        SparseRandomProjection()


def test_entries_have_the_moments_they_should():
    """Mean 0, variance 1 / components, share of zeros, and no correlation between rows; five standard errors."""
    p, k, density = 4000, 300, 0.05
    projection = SparseRandomProjection(k, density=density, seed=3)
    m = projection.matrix(p).double()
    count = m.numel()
    size = (1 / (density * k)) ** 0.5
    assert set(m.unique().tolist()) <= {0.0, *(float(torch.tensor(s * size).float()) for s in (-1, 1))}
    share = float((m != 0).double().mean())
    assert abs(share - density) < 5 * (density * (1 - density) / count) ** 0.5
    assert abs(float(m.mean())) < 5 * (1 / k / count) ** 0.5
    assert abs(float(m.square().mean()) * k - 1) < 5 * ((1 / density - 1) / count) ** 0.5
    columns = (m != 0).double().mean(dim=0)
    assert abs(float(columns[0]) - density) < 5 * (density / k) ** 0.5  # no edge effects
    assert abs(float(columns[-1]) - density) < 5 * (density / k) ** 0.5
    neighbours = (m[1:] * m[:-1]).sum() * k / (count * 1) ** 0.5
    assert abs(float(neighbours)) < 5
    along = (m[:, 1:] * m[:, :-1]).sum() * k / count**0.5
    assert abs(float(along)) < 5


def test_distances_stay():
    rng = np.random.default_rng(0)
    n, p, eps = 40, 20000, 0.25
    x = rng.gamma(0.5, 1.0, (n, p)).astype(np.float32)
    z = SparseRandomProjection(images=n, eps=eps, seed=1).transform(x)
    ratio = torch.pdist(z.double()).square() / torch.pdist(torch.from_numpy(x).double()).square()
    assert float((ratio - 1).abs().max()) < eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", ["auto", 0.3, 1.0])
def test_transform_is_the_product_with_the_matrix(dtype: torch.dtype, density: Any):
    x = torch.randn(9, 700, generator=torch.Generator().manual_seed(0)).to(dtype)
    projection = SparseRandomProjection(300, density=density, seed=2**63 + 5)
    z = projection.transform(x)
    assert z.dtype == dtype
    torch.testing.assert_close(z.double(), x.double() @ projection.matrix(700).double().T, rtol=0, atol=1e-5)
    assert torch.equal(SparseRandomProjection(**projection.settings()).transform(x), z)
    assert not torch.equal(SparseRandomProjection(300, density=density, seed=1).transform(x), z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_split_into_batches_changes_no_bit(dtype: torch.dtype):
    x = torch.randn(70, 3000, generator=torch.Generator().manual_seed(1)).to(dtype)
    projection = SparseRandomProjection(50, seed=4)
    whole = projection.transform(x)
    parts = torch.cat([projection.transform(part) for part in x.split((1, 2, 7, 60))])
    assert torch.equal(whole, parts)


def test_rows_do_not_depend_on_how_many_there_are():
    few, many = SparseRandomProjection(5, seed=9), SparseRandomProjection(500, seed=9)
    for c in range(5):
        for a, b in zip(few.row(c, 10000), many.row(c, 10000), strict=True):
            np.testing.assert_array_equal(a, b)
        assert (np.diff(few.row(c, 10000)[0]) > 0).all()
    with pytest.raises(ValueError, match="component should be 0 to 4, got 5"):
        few.row(5, 100)


def test_bad_options_are_refused():
    for options, sentence in (
        ({"components": 0}, "components should be at least 1"),
        ({"components": 3, "density": 0}, "density should be"),
        ({"components": 3, "seed": -1}, "seed should be"),
        ({"images": 1}, "images should be at least 2"),
        ({"images": 10, "eps": 1.5}, "eps between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            SparseRandomProjection(**options)  # type: ignore[arg-type]

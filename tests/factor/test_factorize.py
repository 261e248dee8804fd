"""Factorizations: known factors, scikit-learn's NMF, properties, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import NMF
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from cortexloop.factor import Factors, factorize, factorize_layers
from cortexloop.factor.nmf import initial, leading_vectors, split_signs


def planted(count: int, rng: np.random.Generator, noise: float = 0.3, c: int = 40) -> Tensor:
    """Three noisy factors on maps of 9 x 9, float64 [T, C, 9, 9], masks at random places."""
    yy, xx = np.mgrid[:9, :9]
    tensors = []
    for _ in range(count):
        tensor = noise * rng.standard_normal((c, 9, 9))
        for _ in range(3):
            x0, y0, s = *rng.uniform(1, 7, 2), rng.uniform(0.8, 2)
            mask = np.exp(-((xx - x0) ** 2 + (yy - y0) ** 2) / (2 * s * s))
            tensor += rng.standard_normal((c, 1, 1)) * (rng.random((c, 1, 1)) < 0.4) * mask
        tensors.append(tensor)
    return torch.from_numpy(np.stack(tensors))


def sklearn_nmf(tensor: Tensor, rank: int, **options: float) -> tuple[float, float, int]:
    """Squared error of the stacked and of the signed matrix, and iterations, as the published code has it."""
    m = tensor.flatten(1).T.numpy()
    c = m.shape[1]
    x = np.concatenate([m.clip(0), (-m).clip(0)], axis=1) if (m < 0).any() else m
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = NMF(rank, init="nndsvda", random_state=0, max_iter=200, tol=1e-4, **options)
        w = model.fit_transform(x)
    h = model.components_
    signed = h[:, :c] - h[:, c:] if h.shape[1] > c else h
    return float(((x - w @ h) ** 2).sum()), float(((m - w @ signed) ** 2).sum()), model.n_iter_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_good_as_scikit_learn(rng: np.random.Generator, dtype: torch.dtype):
    tensors = planted(8, rng).to(dtype)
    found = factorize(tensors, rank=3, border=0)
    ours, theirs = [], []
    for t, tensor in enumerate(tensors):
        _, error, steps = sklearn_nmf(tensor, 3)
        theirs.append(error)
        ours.append(float((tensor - found.select([t]).tensor()[0]).square().sum()))
        if dtype == torch.float64:
            assert int(found.iterations[t]) == steps
    ratio = np.array(ours) / np.array(theirs)
    assert ratio.max() < 1 + 1e-3
    assert abs(np.median(ratio) - 1) < 1e-5


def test_penalties_are_those_of_scikit_learn(rng: np.random.Generator):
    tensors = planted(4, rng)
    found = factorize(tensors, rank=3, border=0, alpha=2e-3, l1_ratio=0.6, max_iterations=200)
    for t, tensor in enumerate(tensors):
        _, error, steps = sklearn_nmf(tensor, 3, alpha_W=2e-3, l1_ratio=0.6)
        assert int(found.iterations[t]) == steps
        np.testing.assert_allclose(float((tensor - found.select([t]).tensor()[0]).square().sum()), error, rtol=1e-6)


def test_matrices_without_negative_entries_are_not_stacked(rng: np.random.Generator):
    tensors = planted(4, rng).abs()
    tensors[1] = -tensors[1]  # one that has to be stacked among others
    found = factorize(tensors, rank=2, border=0)
    for t, tensor in enumerate(tensors):
        _, error, steps = sklearn_nmf(tensor, 2)
        assert int(found.iterations[t]) == steps
        np.testing.assert_allclose(float((tensor - found.select([t]).tensor()[0]).square().sum()), error, rtol=1e-6)
    assert (found.vectors[[0, 2, 3]] >= 0).all()
    assert (found.vectors[1] <= 0).all()


@pytest.mark.parametrize("method", ["posneg_nmf", "semi_nmf", "svd"])
def test_exact_tensors_are_recovered(rng: np.random.Generator, method: str):
    """Disjoint masks with orthogonal vectors of different norms: every method finds these very factors."""
    masks = torch.zeros(3, 2, 8, 7, dtype=torch.float64)
    masks[:, 0, 1:4, 1:4] = torch.from_numpy(rng.uniform(0.5, 1.5, (3, 3, 3)))
    masks[:, 1, 4:7, 3:6] = torch.from_numpy(rng.uniform(0.5, 1.5, (3, 3, 3)))
    vectors = torch.from_numpy(rng.standard_normal((3, 2, 10)))
    vectors[:, 0, 5:], vectors[:, 1, :5] = 0.0, 0.0
    vectors[:, 1] *= 3.0  # the second is stronger, so it comes first
    tensor = torch.einsum("trc,trhw->tchw", vectors, masks)
    found = factorize(tensor, method, rank=2, border=1, tolerance=1e-10, max_iterations=2000)
    torch.testing.assert_close(found.tensor(), tensor, rtol=1e-5, atol=1e-6)
    unit = masks / masks.flatten(2).norm(dim=2)[..., None, None]
    if method != "semi_nmf":  # with free vectors, masks may be mixed a little and vectors unmix them
        torch.testing.assert_close(found.masks, unit.flip(1), rtol=1e-4, atol=1e-4)
    assert (found.explained > 1 - 1e-9).all()
    assert (found.correlation > 1 - 1e-9).all()
    assert (found.norms[:, 0] >= found.norms[:, 1]).all()


def test_promises_of_factors(rng: np.random.Generator):
    tensors = planted(6, rng).float()
    ranks = (1, 2, 3, 5)
    for method in ("posneg_nmf", "semi_nmf", "svd"):
        sweeps = factorize(tensors, method, ranks=ranks, border=1)
        assert tuple(sweeps) == ranks
        for rank, found in sweeps.items():
            assert found.masks.shape == (6, rank, 9, 9)
            assert found.vectors.shape == (6, rank, 40)
            assert found.rank == rank
            torch.testing.assert_close(found.masks.flatten(2).norm(dim=2), torch.ones(6, rank))
            assert (found.norms.diff(dim=1) <= 1e-5).all()
            edge = found.masks.clone()
            edge[..., 1:-1, 1:-1] = 0
            assert not edge.any()
            if method != "svd":
                assert (found.masks >= 0).all()
            inner, fit = tensors[..., 1:-1, 1:-1], found.tensor()[..., 1:-1, 1:-1]
            rest = (inner - fit).flatten(1).double().square().sum(1)
            explained = 1 - rest / inner.flatten(1).double().square().sum(1)
            torch.testing.assert_close(found.explained, explained, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.explained_published, 1 - (1 - explained).sqrt(), rtol=1e-5, atol=1e-6)
            for t in range(6):
                r = np.corrcoef(inner[t].flatten().numpy(), fit[t].flatten().numpy())[0, 1]
                assert abs(float(found.correlation[t]) - r) < 1e-5
        explained = torch.stack([found.explained for found in sweeps.values()])
        assert (explained.diff(dim=0) > -1e-3).all()


def test_svd_bounds_semi_nmf_bounds_nmf(rng: np.random.Generator):
    tensors = planted(8, rng)
    svd, semi, posneg = (factorize(tensors, m, border=0).explained for m in ("svd", "semi_nmf", "posneg_nmf"))
    assert (svd >= semi - 1e-9).all()
    assert (semi >= posneg - 1e-9).all()
    matrix = tensors[0].flatten(1).numpy()
    s = np.linalg.svd(matrix, compute_uv=False)
    assert abs(float(svd[0]) - (s[:3] ** 2).sum() / (s**2).sum()) < 1e-10


def test_neurons_do_not_depend_on_each_other(rng: np.random.Generator):
    tensors = planted(7, rng)
    together = factorize(tensors, border=0)
    for t in (0, 3, 6):
        alone = factorize(tensors[t : t + 1], border=0)
        torch.testing.assert_close(alone.tensor(), together.select([t]).tensor(), rtol=1e-9, atol=1e-10)
        assert torch.equal(alone.iterations, together.iterations[t : t + 1])
    again = factorize(tensors, border=0)
    assert torch.equal(again.masks, together.masks)
    assert torch.equal(again.vectors, together.vectors)


def test_many_neurons_take_turns(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch):
    """Slots that are refilled as neurons end give the same as all at once."""
    tensors = planted(9, rng)
    tensors[4] = 0.0
    at_once = factorize(tensors, border=0)
    monkeypatch.setattr("cortexloop.backends.reference.nmf._CPU_BYTES", 2 * 2 * 81 * 80 * 8)
    in_turns = factorize(tensors, border=0)
    torch.testing.assert_close(in_turns.tensor(), at_once.tensor(), rtol=1e-9, atol=1e-10)
    assert torch.equal(in_turns.iterations, at_once.iterations)
    assert at_once.empty == [(4, 0), (4, 1), (4, 2)]


@pytest.mark.parametrize("method", ["posneg_nmf", "semi_nmf", "svd"])
def test_tensors_of_lower_rank_have_listed_empty_factors(rng: np.random.Generator, method: str):
    mask = torch.zeros(2, 1, 6, 6, dtype=torch.float64)
    mask[:, 0, 2:4, 2:5] = 1.0
    tensor = torch.einsum("trc,trhw->tchw", torch.from_numpy(rng.standard_normal((2, 1, 8))), mask)
    tensor[1] = 0.0
    if method == "svd":
        with pytest.warns(RuntimeWarning, match="neurons 0 have a lower rank than 3"):
            found = factorize(tensor, method, rank=3)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NMF may share one factor among several
            found = factorize(tensor, method, rank=3)
    for values in (found.masks, found.vectors, found.explained, found.explained_published, found.correlation):
        assert torch.isfinite(values).all()
    assert {(1, 0), (1, 1), (1, 2)} <= set(found.empty)
    torch.testing.assert_close(found.tensor(), tensor, rtol=1e-3, atol=1e-3)
    assert float(found.explained[1]) == 0.0


def test_random_restarts_do_not_hurt(rng: np.random.Generator):
    tensors = planted(3, rng)
    one = factorize(tensors, border=0, init="random", seed=5)
    best = factorize(tensors, border=0, init="random", seed=5, restarts=4)
    assert (best.explained >= one.explained).all()
    assert torch.equal(factorize(tensors, border=0, init="random", seed=5).masks, one.masks)
    assert not torch.equal(factorize(tensors, border=0, init="random", seed=6).masks, one.masks)


def test_extreme_units_do_no_harm(rng: np.random.Generator):
    tensors = planted(3, rng)
    usual = factorize(tensors, border=0).explained
    for unit in (1e-9, 1e9):
        found = factorize(tensors * unit, border=0)
        assert torch.isfinite(found.vectors).all()
        assert (found.explained > usual - 0.02).all()


def test_layers_of_one_shape_go_together(rng: np.random.Generator):
    tensors = {"a": planted(2, rng), "b": planted(3, rng, c=20), "c": planted(1, rng)}
    found = factorize_layers(tensors, rank=2, border=0)
    assert list(found) == ["a", "b", "c"]
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name].tensor(), factorize(tensor, rank=2, border=0).tensor())


def test_start_of_large_maps_by_subspace_iteration(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch):
    signed = planted(1, rng)[0].flatten(1).T
    m = split_signs(signed)
    exact = leading_vectors(m @ m.T, 3)
    monkeypatch.setattr("cortexloop.factor.nmf._EXACT_SVD_UP_TO", 10)
    quick = leading_vectors(m @ m.T, 3)
    torch.testing.assert_close((exact.T @ quick).abs(), torch.eye(3, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    for factor in initial(signed[None], 3, True, "nndsvda", [0]):
        assert (factor > 0).all()


def test_saved_factors_come_back(tmp_path: Path, rng: np.random.Generator):
    found = factorize(planted(3, rng).float(), border=1)
    found.save(tmp_path / "factors.safetensors")
    back = Factors.load(tmp_path / "factors.safetensors")
    for name in ("masks", "vectors", "explained", "explained_published", "correlation", "iterations"):
        assert torch.equal(getattr(back, name), getattr(found, name))
    assert (back.method, back.border, back.settings) == (found.method, found.border, found.settings)
    (tmp_path / "broken").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot be used"):
        Factors.load(tmp_path / "broken")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 6}, r"rank should lie in 1\.\.5, the smaller of 5 channels and 7 x 7 positions"),
        ({"rank": 0}, "rank should lie in"),
        ({"ranks": ()}, "rank should lie in"),
        ({"border": 5}, "leave positions of a map of 9 x 9, got 5"),
        ({"border": -1}, "border should be at least 0"),
        ({"method": "cp"}, "method should be one of"),
        ({"init": "zeros"}, "init should be one of"),
        ({"restarts": 0}, "at least 1"),
        ({"tensor": torch.zeros(5, 9, 9)}, "tensor should have 4 axes"),
        ({"tensor": torch.full((1, 5, 9, 9), torch.nan)}, "tensor should be finite"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], message: str):
    options = {"tensor": torch.ones(2, 5, 9, 9), **change}
    with pytest.raises(ValueError, match=message):
        factorize(**options)


def test_nothing_in_nothing_out():
    found = factorize(torch.zeros(0, 5, 6, 6), rank=2)
    assert found.masks.shape == (0, 2, 6, 6)
    assert factorize(torch.zeros(0, 5, 6, 6), "semi_nmf", rank=2).vectors.shape == (0, 2, 5)
    with pytest.raises(TypeError, match="tensor should be a tensor or an array"):
        factorize([1, 2])

"""Sums and products whose bits depend on nothing but their terms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cortexloop.evolve.sums import SplitMatrix, running_sum


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 40])
def test_running_sum(length: int, rng: np.random.Generator):
    x = torch.from_numpy(rng.normal(size=(3, length)))
    assert torch.allclose(running_sum(x), x.cumsum(1), rtol=0, atol=1e-13)
    assert torch.equal(running_sum(x)[1:2], running_sum(x[1:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "inner", "columns"), [(3, 1, 5), (16, 21, 20), (40, 700, 9), (2, 3000, 4)])
def test_products_are_right_and_independent_of_the_order(
    rows: int, inner: int, columns: int, dtype: torch.dtype, rng: np.random.Generator
):
    """Summing the inner axis in another order, or in parts, gives the same bits: no partial sum is rounded."""
    x = torch.from_numpy(rng.normal(size=(rows, inner)) * np.exp(rng.normal(size=(rows, 1)) * 5)).to(dtype)
    matrix = torch.from_numpy(rng.normal(size=(inner, columns)) * 1e-3).to(dtype)
    found = SplitMatrix(matrix).multiply(x)
    bound = x.double().abs().amax(1, keepdim=True) * matrix.double().abs().max() * inner
    assert ((found - x.double() @ matrix.double()).abs() <= 2**-38 * bound).all()
    shuffled = torch.from_numpy(rng.permutation(inner))
    assert torch.equal(SplitMatrix(matrix[shuffled]).multiply(x[:, shuffled]), found)
    assert torch.equal(SplitMatrix(matrix).multiply(x[1:2]), found[1:2])


def test_zeros():
    found = SplitMatrix(torch.eye(3)).multiply(torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, -2.0]]))
    assert found.tolist() == [[0.0, 0.0, 0.0], [1.0, 0.0, -2.0]]

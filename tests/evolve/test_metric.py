"""The metric of a generator against the Jacobian written out."""

from __future__ import annotations

import pytest
import torch

from cortexloop import evolve


def test_metric_is_that_of_the_jacobian():
    generator = evolve.FourierGenerator(12, 10, dim=30)
    codes = 3 * torch.randn(3, 30, generator=torch.Generator().manual_seed(1))
    jacobians = [torch.autograd.functional.jacobian(generator, code).flatten(0, 2).double() for code in codes]
    full = sum(j.T @ j for j in jacobians) / (3 * 360)
    values, vectors = evolve.pixel_metric(generator, codes, rank=6, iterations=8)
    expected = torch.linalg.eigvalsh(full).flip(0)[:6]
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(full @ vectors, values * vectors, rtol=0, atol=2e-3 * float(values[0]))
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(6).double(), rtol=0, atol=1e-10)


def test_an_optimiser_takes_it():
    generator = evolve.FourierGenerator(16, 16, dim=40)
    values, vectors = evolve.pixel_metric(generator, torch.zeros(1, 40), rank=12)
    optimiser = evolve.HessianCMA(40, eigenvalues=values, eigenvectors=vectors, exponent=0.5, problems=2)
    assert optimiser.cutoff == 12
    steps = optimiser.ask() - optimiser.centre[:, None]
    # With e = 1/2 a step along every eigenvector changes the image alike: the long ones are those that hardly show.
    along = (steps.double() @ vectors).square().mean(dim=(0, 1)).sqrt()
    assert float(along[-1] / along[0]) == pytest.approx(float((values[0] / values[-1]).sqrt()), rel=0.5)


def test_bad_arguments_are_refused():
    generator = evolve.FourierGenerator(8, 8, dim=5)
    with pytest.raises(ValueError, match=r"codes should be \[k, 5\]"):
        evolve.pixel_metric(generator, torch.zeros(2, 4), rank=2)
    with pytest.raises(ValueError, match="rank should be from 1 to 5"):
        evolve.pixel_metric(generator, torch.zeros(2, 5), rank=6)

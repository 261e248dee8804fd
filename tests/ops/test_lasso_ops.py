"""The lasso operator: exact problems, equal bits on every instruction set and for any number of threads, both forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cortexloop as cl
from cortexloop import functional
from cortexloop.functional import LassoSets

Problems = tuple[LassoSets, Tensor, Tensor, Tensor, Tensor, Tensor | None]


def soft(values: Tensor, limit: Tensor) -> Tensor:
    return values.sign() * (values.abs() - limit).clamp(min=0)


def random_problems(form: str, n: int = 30, p: int = 45, t: int = 3, s: int = 2, a: int = 6, seed: int = 0) -> Problems:
    """s training sets of n images, t neurons on each, a falling penalties."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, generator=g).double() @ (torch.eye(p) + torch.randn(p, p, generator=g) / p**0.5).double()
    y = torch.randn(n, t, generator=g).double() + x[:, :3].sum(dim=1, keepdim=True)
    masks = torch.stack([torch.arange(n) % s != i for i in range(s)]) if s > 1 else torch.ones(1, n, dtype=torch.bool)
    grams, crosses, squares, responses, means = [], [], [], [], []
    for mask in masks:
        mean = x[mask].mean(dim=0)
        centred = (x - mean) * mask[:, None]
        target = (y - y[mask].mean(dim=0)) * mask[:, None]
        grams.append(centred.T @ centred)
        crosses.append(target.T @ centred)
        squares.append(target.square().sum(dim=0))
        responses.append(target.T)
        means.append(mean)
    gram, cross = torch.stack(grams), torch.cat(crosses)
    diagonal = gram.diagonal(dim1=1, dim2=2).contiguous()
    penalties = cross.abs().amax(dim=1, keepdim=True) * torch.logspace(0, -2, a, dtype=torch.float64)
    set_of = torch.arange(s).repeat_interleave(t)
    if form == "gram":
        return LassoSets(n, diagonal, gram), set_of, cross, torch.cat(squares), penalties, None
    sets = LassoSets(n, diagonal, columns=x.T.contiguous(), mask=masks.double(), means=torch.stack(means))
    return sets, set_of, cross, torch.cat(squares), penalties, torch.cat(responses).contiguous()


@pytest.fixture(params=["gram", "columns"])
def form(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def test_orthogonal_features_are_soft_thresholded_exactly(engine: str):
    """Gram matrices of powers of four, halving penalties and small whole numbers: every operation is exact."""
    g = torch.Generator().manual_seed(1)
    square = 4.0 ** torch.randint(0, 3, (2, 9), generator=g).double()
    cross = torch.randint(-40, 41, (4, 9), generator=g).double()
    set_of = torch.tensor([0, 1, 1, 0])
    penalties = torch.tensor([[32.0, 16.0, 8.0, 4.0]]).repeat(4, 1).double()
    squares = (cross.square() / square[set_of]).sum(dim=1) + 5
    with cl.use_backend(engine):
        weights, gaps, _ = functional.lasso_path(
            LassoSets(100, square, torch.diag_embed(square)), set_of, cross, squares, penalties, tol=0.0
        )
    expected = soft(cross[:, None], penalties[..., None]) / square[set_of][:, None]
    assert torch.equal(weights, expected)
    assert float(gaps.abs().max()) < 1e-14


def test_optimality_conditions_hold(engine: str, form: str):
    sets, set_of, cross, squares, penalties, responses = random_problems(form, n=24, p=20, t=2, a=4)
    gram = random_problems("gram", n=24, p=20, t=2, a=4)[0].gram
    assert gram is not None
    with cl.use_backend(engine):
        weights, gaps, sweeps = functional.lasso_path(
            sets, set_of, cross, squares, penalties, responses, tol=1e-11, max_sweeps=100000
        )
    assert float(gaps.max()) <= 1e-11
    assert sweeps.dtype == torch.int64
    slope = cross[:, None] - torch.einsum("npq,naq->nap", gram[set_of], weights)
    limit = penalties[..., None]
    assert float((slope.abs() / limit).max()) < 1 + 1e-4
    used = weights != 0
    assert float(((slope - limit * weights.sign()).abs() / limit)[used].max()) < 1e-4
    assert used[:, -1].any()


def test_reported_gaps_are_those_of_the_definition(engine: str, form: str):
    """Loose tolerance, so that there are gaps to report."""
    sets, set_of, cross, squares, penalties, responses = random_problems(form, n=24, p=20, t=2, a=4)
    gram = random_problems("gram", n=24, p=20, t=2, a=4)[0].gram
    assert gram is not None
    with cl.use_backend(engine):
        weights, gaps, _ = functional.lasso_path(
            sets, set_of, cross, squares, penalties, responses, tol=1e-2, max_sweeps=2
        )
    slope = cross[:, None] - torch.einsum("npq,naq->nap", gram[set_of], weights)
    fitted = (cross[:, None] * weights).sum(-1)
    residual = squares[:, None] - fitted - (slope * weights).sum(-1)
    scale = (penalties / slope.abs().amax(-1)).clamp(max=1)
    primal = residual / 2 + penalties * weights.abs().sum(-1)
    dual = scale * (squares[:, None] - fitted) - scale**2 * residual / 2
    torch.testing.assert_close(gaps, (primal - dual) / squares[:, None], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_every_instruction_set_gives_the_same_bits(form: str, seed: int, kernels: None):
    problems = random_problems(form, p=70, seed=seed)
    before = cl._native.isa()
    results = []
    try:
        for name in cl._native.isas():
            cl._native.set_isa(name)
            results.append(functional.lasso_path(*problems, tol=1e-6, backend="cpu"))
    finally:
        cl._native.set_isa(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_threads_and_company_change_nothing(form: str, kernels: None, restore_threads: None):
    sets, set_of, cross, squares, penalties, responses = random_problems(form, t=5)
    cl.set_num_threads(1)
    one = functional.lasso_path(sets, set_of, cross, squares, penalties, responses)
    cl.set_num_threads(3)
    three = functional.lasso_path(sets, set_of, cross, squares, penalties, responses)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    for i in (0, 7):
        row = slice(i, i + 1)
        own = None if responses is None else responses[row]
        alone = functional.lasso_path(sets, set_of[row], cross[row], squares[row], penalties[row], own)
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, one, strict=True))


def test_agrees_with_the_reference(form: str, kernels: None):
    problems = random_problems(form, n=24, p=20, t=2, a=4)
    ours = functional.lasso_path(*problems, tol=1e-12, backend="cpu")
    theirs = functional.lasso_path(*problems, tol=1e-12, backend="reference", max_sweeps=100000)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "p"), [(12, 200), (200, 12), (2, 1), (9, 8), (17, 9), (17, 16)])
def test_sizes(engine: str, form: str, n: int, p: int):
    """More features than the working set holds, whole and broken lines, one of everything."""
    problems = random_problems(form, n=n, p=p, t=2, s=1, a=4, seed=n)
    with cl.use_backend(engine):
        weights, gaps, _ = functional.lasso_path(*problems, tol=1e-5)
    assert float(gaps.max()) <= 1e-5
    assert tuple(weights.shape) == (2, 4, p)
    assert torch.isfinite(weights).all()


def test_working_set_makes_room(kernels: None):
    """Far more features than twice the images and 256 that take turns."""
    problems = random_problems("columns", n=8, p=900, t=2, s=1, a=60, seed=3)
    weights, gaps, _ = functional.lasso_path(*problems, tol=1e-9)
    assert float(gaps.max()) <= 1e-9
    small = functional.lasso_path(*random_problems("gram", n=8, p=900, t=2, s=1, a=60, seed=3), tol=1e-9)[0]
    torch.testing.assert_close(weights, small, rtol=1e-4, atol=1e-6)


def test_features_that_are_constant_in_a_set_get_no_weight(engine: str, form: str):
    sets, set_of, cross, squares, penalties, responses = random_problems(form, n=24, p=20, t=2, a=4)
    diagonal, cross = sets.diagonal.clone(), cross.clone()
    diagonal[:, 3] = 0
    cross[:, 3] = 0
    if sets.gram is not None:
        gram = sets.gram.clone()
        gram[:, 3] = 0
        gram[:, :, 3] = 0
        sets = sets._replace(gram=gram)
    with cl.use_backend(engine):
        weights, gaps, _ = functional.lasso_path(
            sets._replace(diagonal=diagonal), set_of, cross, squares, penalties, responses, tol=1e-8
        )
    assert not weights[..., 3].any()
    if form == "gram":  # columns alone do not say that the feature is constant
        assert float(gaps.max()) <= 1e-8


def test_responses_that_are_zero_give_zero(engine: str):
    sets, set_of, cross, squares, penalties, _ = random_problems("gram")
    with cl.use_backend(engine):
        weights, gaps, sweeps = functional.lasso_path(sets, set_of, 0 * cross, 0 * squares, penalties)
    assert not weights.any()
    assert not gaps.any()
    assert not sweeps.any()


def test_penalties_in_any_order(engine: str):
    sets, set_of, cross, squares, penalties, _ = random_problems("gram", n=24, p=20, t=2, a=4)
    shuffled = penalties[:, [2, 0, 3, 1]]
    with cl.use_backend(engine):
        falling = functional.lasso_path(sets, set_of, cross, squares, penalties, tol=1e-9)[0]
        mixed = functional.lasso_path(sets, set_of, cross, squares, shuffled, tol=1e-9)[0]
    torch.testing.assert_close(mixed, falling[:, [2, 0, 3, 1]], rtol=1e-3, atol=1e-4)


def test_bad_arguments_are_told_in_a_sentence():
    sets, set_of, cross, squares, penalties, _ = random_problems("gram")
    columns, *_, responses = random_problems("columns")
    assert responses is not None
    good = (sets, set_of, cross, squares, penalties)
    with pytest.raises(ValueError, match=r"set_of should be 0 to 1, got 0 to 2"):
        functional.lasso_path(sets, set_of * 2, *good[2:])
    with pytest.raises(TypeError, match=r"squares should be torch\.float64, got torch\.float32"):
        functional.lasso_path(sets, set_of, cross, squares.float(), penalties)
    with pytest.raises(ValueError, match="penalties should be positive finite numbers"):
        functional.lasso_path(sets, set_of, cross, squares, 0 * penalties)
    with pytest.raises(ValueError, match="tol should be at least 0"):
        functional.lasso_path(*good, tol=-1.0)
    with pytest.raises(ValueError, match="max_sweeps at least 1"):
        functional.lasso_path(*good, max_sweeps=0)
    with pytest.raises(ValueError, match="either gram or columns"):
        functional.lasso_path(sets._replace(gram=None), *good[1:])
    with pytest.raises(ValueError, match="responses is needed where sets have columns"):
        functional.lasso_path(columns, *good[1:])
    with pytest.raises(ValueError, match=r"responses should be \[6, 30\] on cpu, got \[5, 30\]"):
        functional.lasso_path(columns, *good[1:], responses[:5])
    with pytest.raises(ValueError, match=r"gram should be \[2, 45, 45\]"):
        functional.lasso_path(sets._replace(gram=sets.gram[:, :40]), *good[1:])  # type: ignore[index]
    with pytest.raises(ValueError, match="cross should have 2 axes"):
        functional.lasso_path(sets, set_of, cross[0], squares, penalties)


def test_explain_knows_the_operator(kernels: None):
    assert cl.explain("lasso_path", dtype="float64").chosen == "cpu"
    with pytest.raises(cl.BackendError, match="take float64, these are float32"):
        cl.explain("lasso_path", dtype="float32")

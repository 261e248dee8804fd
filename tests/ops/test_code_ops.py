"""Operators on populations of codes: what the random numbers are, and equal bits on every backend and processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import cortexloop as cl
from cortexloop import ops

U32 = np.uint64(0xFFFFFFFF)


def philox(counter: list[NDArray[np.uint64]], key: tuple[int, int]) -> list[NDArray[np.uint64]]:
    """Philox 4x32-10, written from Salmon et al. (2011), over arrays of 32-bit words held in uint64."""
    c = [x.astype(np.uint64) for x in counter]
    k = [np.uint64(key[0]), np.uint64(key[1])]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & U32, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & U32]
        k = [(k[0] + np.uint64(0x9E3779B9)) & U32, (k[1] + np.uint64(0xBB67AE85)) & U32]
    return c


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_this_files_philox_has_the_published_answers(counter: list[int], key: tuple[int, int], expected: str):
    """The known answers of Random123, so that what the kernels are compared with below is Philox indeed."""
    words = philox([np.array([c], np.uint64) for c in counter], key)
    assert " ".join(f"{int(w[0]):08x}" for w in words) == expected


def words_in_columns(seed: int, stream: int, step: int, problem: int, row: int, columns: int) -> NDArray[np.uint64]:
    """Column 64 g + 16 k + l holds word k of block 16 g + l."""
    groups = -(-columns // 64)
    blocks = np.arange(16 * groups, dtype=np.uint64)
    rest = [np.full_like(blocks, v) for v in (stream << 24 | row, step, problem)]
    words = philox([blocks, *rest], (seed & 0xFFFFFFFF, seed >> 32))
    return np.stack([w.reshape(groups, 16) for w in words], axis=1).reshape(-1)[:columns]


KEYS = [(0, 0, 0, 0), (2**64 - 1, 255, 2**32 - 1, 2**32 - 1), (12345678901234567, 3, 71, 40)]


@pytest.mark.parametrize(("seed", "stream", "step", "problem"), KEYS)
def test_uniforms_are_the_upper_bits_of_philox(engine: str, seed: int, stream: int, step: int, problem: int):
    with cl.use_backend(engine):
        got = ops.uniforms(seed, stream, step, torch.tensor([problem]), 3, 200)
    assert got.dtype == torch.float32
    assert tuple(got.shape) == (1, 3, 200)
    for row in range(3):
        words = words_in_columns(seed, stream, step, problem, row, 200)
        np.testing.assert_array_equal(got[0, row].numpy(), ((words >> np.uint64(8)) * 2.0**-24).astype(np.float32))


@pytest.mark.parametrize(("seed", "stream", "step", "problem"), KEYS)
def test_normals_are_box_muller(engine: str, seed: int, stream: int, step: int, problem: int):
    """Within the rounding of float32 of the formula in float64; the angle starts at -pi/4."""
    with cl.use_backend(engine):
        got = ops.normals(seed, stream, step, torch.tensor([problem]), 2, 4096)
    for row in range(2):
        words = words_in_columns(seed, stream, step, problem, row, 4096).reshape(64, 4, 16)
        unit = (words >> np.uint64(8)).astype(np.float64) / 2**24
        r = np.sqrt(-2 * np.log(unit[:, 0::2] + 2.0**-24))
        angle = 2 * np.pi * unit[:, 1::2] - np.pi / 4
        expected = np.stack([r * np.cos(angle), r * np.sin(angle)], axis=2).reshape(-1)
        np.testing.assert_allclose(got[0, row].numpy(), expected, rtol=0, atol=2e-6)


def test_normals_are_normal():
    """Moments of a million numbers within five standard errors; neighbours in every index do not correlate."""
    z = ops.normals(5, 0, 0, torch.arange(8), 32, 4096).double()
    count = z.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - expected) < 5 * (variance / count) ** 0.5
    assert float(z.abs().max()) < 5.78
    for axis in range(3):
        pair = z.narrow(axis, 1, z.shape[axis] - 1) * z.narrow(axis, 0, z.shape[axis] - 1)
        assert abs(float(pair.mean())) < 5 / pair.numel() ** 0.5
    step = ops.normals(5, 0, 1, torch.arange(8), 32, 4096).double()
    assert abs(float((z * step).mean())) < 5 / count**0.5


def everything(n: int, rows: int, columns: int, rank: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(n + rows + columns)
    problems = torch.arange(n) * 3 + 1

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    mean, scale, diagonal = draw(n, columns), draw(n).abs(), draw(n, columns).abs()
    factors = draw(n, rank, columns), draw(n, rank, columns)
    codes = ops.sample_codes(7, 1, 2, problems, rows, mean, scale, diagonal, factors)
    weights = draw(n, rows)
    weights[:, 0] = 0
    first, second = ops.code_moments(codes, weights, mean)
    alone, none = ops.code_moments(codes, weights)
    assert none is None
    assert second is not None
    assert torch.equal(alone, first)
    return [
        ops.normals(7, 0, 1, problems, rows, columns),
        ops.uniforms(7, 0, 1, problems, rows, columns),
        ops.sample_codes(7, 1, 2, problems, rows, mean, scale),
        codes,
        first,
        second,
        ops.low_rank_product(mean, *factors),
        ops.row_dots(mean, diagonal),
    ]


@pytest.mark.parametrize(
    ("n", "rows", "columns", "rank"), [(1, 1, 1, 1), (2, 3, 63, 2), (3, 2, 64, 0), (2, 5, 1300, 7)]
)
def test_every_backend_gives_the_same_bits(isa: str, n: int, rows: int, columns: int, rank: int):
    with cl.use_backend("cpu"):
        got = everything(n, rows, columns, rank)
    with cl.use_backend("reference"):
        expected = everything(n, rows, columns, rank)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_threads_and_split_change_nothing(kernels: None):
    before = cl.get_num_threads()
    try:
        cl.set_num_threads(1)
        one = everything(6, 9, 2500, 3)
        cl.set_num_threads(3)
        three = everything(6, 9, 2500, 3)
    finally:
        cl.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    whole = ops.normals(1, 2, 3, torch.tensor([4, 9, 11]), 5, 77)
    part = ops.normals(1, 2, 3, torch.tensor([9]), 3, 70)
    assert torch.equal(part[0], whole[1, :3, :70])


def test_sampling_against_float64(engine: str):
    g = torch.Generator().manual_seed(3)
    n, rows, columns, rank = 3, 4, 333, 5
    mean, diagonal = torch.randn(n, columns, generator=g), torch.rand(n, columns, generator=g)
    left, right = (torch.randn(n, rank, columns, generator=g) / 10 for _ in range(2))
    scale, problems = torch.tensor([0.5, 1.0, 2.0]), torch.arange(n)
    with cl.use_backend(engine):
        z = ops.normals(9, 0, 0, problems, rows, columns).double()
        codes = ops.sample_codes(9, 0, 0, problems, rows, mean, scale, diagonal, (left, right))
        low = ops.low_rank_product(mean, left, right)
        weights = torch.rand(n, rows, generator=g)
        first, second = ops.code_moments(codes, weights, mean)
    matrix = torch.eye(columns).double() + left.double().mT @ right.double()
    expected = mean[:, None] + scale[:, None, None] * diagonal[:, None] * (z @ matrix)
    torch.testing.assert_close(codes.double(), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(low.double(), (mean.double()[:, None] @ matrix)[:, 0], rtol=0, atol=1e-4)
    w = weights.double()[..., None]
    torch.testing.assert_close(first.double(), (w * codes.double()).sum(1), rtol=0, atol=1e-4)
    assert second is not None
    deviation = codes.double() - mean.double()[:, None]
    torch.testing.assert_close(second.double(), (w * deviation**2).sum(1), rtol=0, atol=1e-3)


def test_rows_of_weight_zero_are_not_read(engine: str):
    codes = torch.tensor([[[1.0, 2.0], [torch.nan, torch.inf]]])
    with cl.use_backend(engine):
        first, _ = ops.code_moments(codes, torch.tensor([[2.0, 0.0]]))
    assert first.tolist() == [[2.0, 4.0]]


def test_the_kernels_refuse_what_they_cannot_address(kernels: None):
    good = torch.zeros(1, dtype=torch.int64)
    with cl.use_backend("cpu"):
        with pytest.raises(ValueError, match=r"problems\[0\] is -1"):
            ops.normals(0, 0, 0, torch.tensor([-1]), 1, 4)
        with pytest.raises(ValueError, match="stream should be below 256"):
            ops.normals(0, 256, 0, good, 1, 4)
        with pytest.raises(cl.BackendError, match="take float32 codes, these are float64"):
            ops.row_dots(torch.zeros(1, 4).double(), torch.zeros(1, 4).double())
        with pytest.raises(ValueError, match=r"problems should have shape \[1\], got \[2\]"):
            ops.sample_codes(0, 0, 0, torch.arange(2), 3, torch.zeros(1, 4), torch.ones(1))


def test_explain_knows_the_operators():
    assert cl.explain("sample_codes", dtype="float64").chosen == "reference"
    assert (
        "float32 codes" in str(cl.explain("sample_codes", dtype="float64").reason("cpu"))
        or cl.explain("sample_codes").chosen == "reference"
    )

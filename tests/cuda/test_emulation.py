"""The emulation of CUDA itself: fragments against plain products, halves against NumPy, every misuse reported."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import emulated_build
import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
FAULTS = {
    "partial barrier": "threads 0 to 39 wait in __syncthreads at emulation_check.cpp:[0-9]+; 40 to 63 have returned",
    "partial warp": "threads 0 to 6 wait in mma_16816 at .*; 7 to 7 have returned; 8 to",
    "two places": "not all threads arrive: threads 0 to 0 wait in mma_16816 at .*; 1 to 1 wait in mma_16816 at",
    "different kinds": "threads 0 to 0 wait in __shfl_sync at .*; 1 to 1 wait in __syncwarp at",
    "misaligned row": "ldmatrix_x4 at .*: the address of a row is not a multiple of 16 .*thread 1]",
    "row outside": "ldmatrix_x4 at .*: a row is not inside dynamic shared memory",
    "overrun by one": "byte 4000 was written, past the 4000 bytes of dynamic shared memory",
    "overrun by pages": "byte 4200 of dynamic shared memory was accessed, which has 4096 bytes .*thread 21]",
    "underrun": "byte -1, before dynamic shared memory, was written",
    "null pointer": "address .* was accessed, which is not mapped",
    "outside mask": "__shfl_sync at .* reads lane 5, which its mask 00000003 leaves out",
    "stack": "the stack of a thread overflowed",
    "not tf32": "mma_1688 at .*: lane 9 has an operand that is not a tf32 number",
}


@pytest.fixture(scope="module")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulation")
    try:
        return emulated_build.build([HERE / "emulation_check.cpp"], folder / "libcheck.so")
    except emulated_build.CannotBuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def checked_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checked")
    try:
        return emulated_build.build([HERE / "emulation_check.cpp"], folder / "libcheck.so", checked=True)
    except emulated_build.CannotBuildError as error:
        pytest.skip(str(error))


def load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    products = ("product", "tf32_product")
    for name in (*products, "sums", "lanes", "faulty", "race", "draw", "unwritten", "copies", "sized", "on_device"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.permuted.restype = ctypes.c_uint
    return loaded


@pytest.fixture(scope="module")
def library(library_path: Path) -> ctypes.CDLL:
    return load(library_path)


@pytest.fixture
def settings(library_path: Path) -> Iterator[emulated_build.Settings]:
    """The emulated device, put back after the test."""
    found = emulated_build.Settings(library_path)
    with found.restored():
        yield found


def pointer(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


@pytest.mark.parametrize("schedule", [0, 1, 2, 3])
@pytest.mark.parametrize("way", [0, 1, 2], ids=["elements", "ldmatrix", "ldmatrix-transposed"])
def test_matrix_product(
    library: ctypes.CDLL, settings: emulated_build.Settings, rng: np.random.Generator, way: int, schedule: int
) -> None:
    """Integers, so that any order of summation gives the same bits."""
    settings["schedule"] = schedule
    a = rng.integers(-9, 10, (16, 16)).astype(np.float16)
    b = rng.integers(-9, 10, (16, 8)).astype(np.float16)
    c = rng.integers(-99, 100, (16, 8)).astype(np.float32)
    d = np.full((16, 8), np.nan, np.float32)
    assert library.product(pointer(a), pointer(b), pointer(c), pointer(d), way) == b""
    assert np.array_equal(d, a.astype(np.float32) @ b.astype(np.float32) + c)


@pytest.mark.parametrize("schedule", [0, 1, 2])
def test_tf32_product(
    library: ctypes.CDLL, settings: emulated_build.Settings, rng: np.random.Generator, schedule: int
) -> None:
    settings["schedule"] = schedule
    a = rng.integers(-1024, 1025, (16, 8)).astype(np.float32)  # 11 bits
    b = rng.integers(-1024, 1025, (8, 8)).astype(np.float32)
    c = rng.integers(-99, 100, (16, 8)).astype(np.float32)
    d = np.full((16, 8), np.nan, np.float32)
    assert library.tf32_product(pointer(a), pointer(b), pointer(c), pointer(d)) == b""
    assert np.array_equal(d, a @ b + c)


@pytest.mark.parametrize("schedule", [0, 1, 5])
def test_blocks_shuffles_and_barriers(library: ctypes.CDLL, settings: emulated_build.Settings, schedule: int) -> None:
    settings["schedule"] = schedule
    out = np.full((6, 128), np.nan, np.float32)
    before = settings["blocks"]
    assert library.sums(pointer(out), 3, 2, 16, 8) == b""
    assert settings["blocks"] == before + 6
    assert np.array_equal(out, np.broadcast_to(128 * 129 / 2 + np.arange(128), (6, 128)))


def test_lanes(library: ctypes.CDLL) -> None:
    out = np.zeros((10, 32), np.uint32)
    assert library.lanes(pointer(out)) == b""
    lane = np.arange(32)
    expected = [
        np.full(32, 50),
        lane ^ 3,
        np.full(32, sum(1 << n for n in range(0, 32, 3))),
        np.full(32, 31),
        lane // 8 * 8 + 1,
        np.where(lane < 8, 28, 31 * 32 // 2 - 28),
        np.full(32, 2),
        np.full(32, 7),
        np.where(lane < 2, lane, lane - 2),
        (lane ^ 1) + 1,
    ]
    for got, wanted in zip(out, expected, strict=True):
        assert np.array_equal(got, wanted)


@pytest.mark.parametrize("schedule", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_misuse_is_reported(library: ctypes.CDLL, settings: emulated_build.Settings, fault: str, schedule: int) -> None:
    """As a failed launch that names the kernel and the place, after which the next launch works."""
    settings["schedule"] = schedule
    out = np.zeros(64, np.int32)
    message = library.faulty(list(FAULTS).index(fault), pointer(out)).decode()
    assert message.startswith("CUDA: faulty_kernel failed: ")
    if schedule == 0:
        with pytest.raises(ValueError, match=FAULTS[fault]):
            raise ValueError(message)
    assert library.faulty(len(FAULTS), pointer(out)) == b""
    assert out[0] == 42


def test_schedules_show_a_race(library: ctypes.CDLL, settings: emulated_build.Settings) -> None:
    answers = []
    for schedule in (0, 1):
        settings["schedule"] = schedule
        out = np.zeros(400, np.int32)
        assert library.race(0, pointer(out)) == b""
        answers.append(out)
    assert not np.array_equal(*answers)


RACES = {
    "dynamic": "race: stores to byte 128 of dynamic shared memory .*, which thread 0 loaded .*nothing.*thread 32]",
    "static": "race: stores to a byte of static shared memory .*, which thread 0 loaded",
    "within a warp": "race: stores to byte 4 of dynamic shared memory .*, which thread 0 loaded .*thread 1]",
    "between blocks": "race: stores to the byte at .* of device memory .*, which thread 0 of another block stored to",
    "unaligned": "misaligned: address .* is not a multiple of 8, at emulation_check.cpp:[0-9]+ ",
    "constant": r"the byte at .* is loaded by __ldg .emulation_check.cpp:[0-9]+. and stored to .emulation_check.cpp",
    "copy": "emulation_check.cpp:[0-9]+ touches byte 0 of dynamic shared memory while a copy to it .* is under way",
}


@pytest.mark.parametrize("schedule", [0, 1, 2, 3])
@pytest.mark.parametrize("race", RACES)
def test_checked_build_reports_races(checked_path: Path, race: str, schedule: int) -> None:
    """Whatever the schedule, and whether or not the answer is wrong."""
    library, settings = load(checked_path), emulated_build.Settings(checked_path)
    with settings.restored():
        settings["schedule"] = schedule
        out = np.zeros(400, np.int32)
        message = library.race(list(RACES).index(race), pointer(out)).decode()
    with pytest.raises(ValueError, match=RACES[race] if schedule == 0 else RACES[race].split(" ")[0]):
        raise ValueError(message)


@pytest.mark.parametrize("schedule", [0, 1, 2, 3])
def test_checked_build_has_nothing_against_order(checked_path: Path, rng: np.random.Generator, schedule: int) -> None:
    library, settings = load(checked_path), emulated_build.Settings(checked_path)
    with settings.restored():
        settings["schedule"] = schedule
        out = np.zeros(400, np.int32)
        assert library.race(len(RACES), pointer(out)) == b""
        assert out[160] == 10
        sums = np.zeros((6, 128), np.float32)
        assert library.sums(pointer(sums), 3, 2, 16, 8) == b""
        following, owner = np.zeros(1, np.uint32), np.full(20, -1, np.int32)
        assert library.draw(pointer(following), pointer(owner), owner.size) == b""
        a, b = (rng.integers(-9, 10, (16, n)).astype(np.float16) for n in (16, 8))
        c, d = (np.zeros((16, 8), np.float32) for _ in range(2))
        for way in range(3):
            assert library.product(pointer(a), pointer(b), pointer(c), pointer(d), way) == b""
            assert np.array_equal(d, a.astype(np.float32) @ b.astype(np.float32))


def test_blocks_take_turns(library: ctypes.CDLL, settings: emulated_build.Settings) -> None:
    """In order, the first block draws all units; interleaved, several do, in an order that the seed decides."""
    owners = {}
    for schedule in (0, 1, 2, 3, 2):
        settings["schedule"] = schedule
        following, owner = np.zeros(1, np.uint32), np.full(20, -1, np.int32)
        assert library.draw(pointer(following), pointer(owner), owner.size) == b""
        assert following[0] == 20 + 4
        assert owner.min() >= 0
        if schedule in owners:
            assert owners[schedule] == owner.tolist()
        owners[schedule] = owner.tolist()
    assert set(owners[0]) == {0}
    assert set(owners[1]) == {3}
    assert set(owners[2]) == {0, 1, 2}
    assert owners[2] != owners[3]


def test_schedules_show_unwritten_shared_memory(library: ctypes.CDLL, settings: emulated_build.Settings) -> None:
    answers = set()
    for schedule in (0, 1, 2):
        settings["schedule"] = schedule
        out = np.full(1, np.nan, np.float32)
        assert library.unwritten(pointer(out)) == b""
        answers.add(float(out[0]))
    assert answers == {0.0, 1.0}


def test_asynchronous_copies_arrive_when_waited_for(library: ctypes.CDLL) -> None:
    storage = np.zeros(12, np.int32)
    start = -storage.ctypes.data % 16 // 4
    values = storage[start : start + 8]
    values[:] = np.arange(10, 18)
    out = np.zeros(11, np.int32)
    assert library.copies(pointer(values), pointer(out)) == b""
    assert out.tolist() == [-1, 10, -1, 14, 15, 0, 0, 10, 16, 0, 13]
    assert b"not a multiple of 16" in library.copies(ctypes.c_void_p(values.ctypes.data + 4), pointer(out))


def test_launch_limits(library: ctypes.CDLL, settings: emulated_build.Settings) -> None:
    numbers = np.zeros(64, np.int32)
    out = pointer(numbers)
    assert library.sized(1, 64, 100_000, out) == b""
    assert b"invalid argument" in library.sized(1, 64, 228 * 1024, out)
    settings["shared_memory"] = 99 * 1024
    assert library.sized(1, 64, 99 * 1024, out) == b""
    assert b"invalid argument" in library.sized(1, 64, 99 * 1024 + 1, out)
    assert b"invalid configuration" in library.sized(1, 1025, 1024, out)
    assert b"invalid configuration" in library.sized(0, 64, 1024, out)
    settings["fail_launch"] = 2
    assert b"out of memory" in library.sized(1, 64, 1024, out)
    assert library.sized(1, 64, 1024, out) == b""
    assert library.on_device(0) == b""
    assert b"cudaSetDevice failed: invalid device ordinal" in library.on_device(1)
    settings["devices"] = 2
    assert library.on_device(1) == b""


def test_unknown_setting(settings: emulated_build.Settings) -> None:
    with pytest.raises(KeyError):
        settings["nonsense"]
    with pytest.raises(KeyError):
        settings["nonsense"] = 1


def test_halves_to_floats(library: ctypes.CDLL) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    got = np.empty(bits.size, np.float32)
    library.from_halves(pointer(bits), pointer(got), bits.size)
    expected = bits.view(np.float16).astype(np.float32)
    assert np.array_equal(got, expected, equal_nan=True)
    assert np.array_equal(np.signbit(got), np.signbit(expected))


def test_floats_to_halves(library: ctypes.CDLL, rng: np.random.Generator) -> None:
    """Everything near a tie, every exponent, random bits."""
    halves = np.arange(1 << 15, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    ties = ((halves[:-1].astype(np.float64) + halves[1:]) / 2).astype(np.float32)
    near = [ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf)), halves]
    limits = np.array([65504, 65519.996, 65520, 65536, 1e30, np.inf, np.nan, 0, 1e-45, 2.0**-25, 2.0**-24], np.float32)
    random = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([*near, limits, random])
    x = np.concatenate([x, -x])
    got = np.empty(x.size, np.uint16)
    library.to_halves(pointer(x), pointer(got), x.size)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        expected = x.astype(np.float16)
    assert np.array_equal(got.view(np.float16), expected, equal_nan=True)
    assert np.array_equal(got[~np.isnan(x)], expected.view(np.uint16)[~np.isnan(x)])


def rounded(x: Fraction) -> float:
    """The half nearest to a rational number, ties to even; infinite from 65520 on."""
    if x == 0:
        return 0.0
    exponent = max(math.frexp(float(abs(x)))[1] - 1, -14)
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > -14 and abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    place = Fraction(2) ** (exponent - 10)
    value = float(round(x / place) * place)
    return math.copysign(math.inf, value) if abs(value) > 65504 else value


@pytest.mark.parametrize("operation", ["add", "subtract", "multiply", "fma"])
def test_half_arithmetic_is_rounded_once(library: ctypes.CDLL, rng: np.random.Generator, operation: str) -> None:
    n = 20_000
    x = rng.integers(0, 1 << 16, (3, n), dtype=np.uint16)
    x[:, : n // 2] = rng.normal(0, [[1.0], [0.05], [1.0]], (3, n // 2)).astype(np.float16).view(np.uint16)
    # Products that fall on a tie, with an addend too small to show in double: the case that two roundings get wrong.
    x[0, :32] = np.float16(1 + 2**-5).view(np.uint16)
    x[1, :32] = np.float16(1 + 2**-6).view(np.uint16)
    x[0, 32:64] = np.float16(255.875).view(np.uint16)
    x[1, 32:64] = np.float16(255.875).view(np.uint16)
    x[2, 32:64] = np.array([1, -1] * 16, np.float16).view(np.uint16) & 0x8001 | 1
    values = x.view(np.float16)
    x = np.ascontiguousarray(x[:, np.isfinite(values).all(axis=0)])
    a, b, c = x.view(np.float16).astype(np.float64)
    code = ["add", "subtract", "multiply", "fma"].index(operation)
    got = np.empty(x.shape[1], np.uint16)
    library.arithmetic(code, pointer(x[0]), pointer(x[1]), pointer(x[2]), pointer(got), got.size)
    for i, (p, q, r) in enumerate(zip(a, b, c, strict=True)):
        f, g, h = Fraction(p), Fraction(q), Fraction(r)
        exact = {"add": f + g, "subtract": f - g, "multiply": f * g, "fma": f * g + h}[operation]
        assert rounded(exact) == float(got[i : i + 1].view(np.float16)[0]), (p, q, r)


def test_half_maximum_and_minimum(library: ctypes.CDLL) -> None:
    special = np.array([0.0, -0.0, 1, -1, 6e-8, 65504, np.inf, -np.inf, np.nan], np.float16)
    pairs = np.array(list(itertools.product(special, special)), np.float16).T.copy()
    a, b = pairs.view(np.uint16)
    got = np.empty(a.size, np.uint16)
    for code, expected in ((4, np.fmax(pairs[0], pairs[1])), (5, np.fmin(pairs[0], pairs[1]))):
        library.arithmetic(code, pointer(a), pointer(b), pointer(a), pointer(got), got.size)
        assert np.array_equal(got.view(np.float16), expected, equal_nan=True)


def test_byte_permutation(library: ctypes.CDLL) -> None:
    assert library.permuted(0x33221100, 0x77665544, 0x7531) == 0x77553311
    assert library.permuted(0x33221100, 0x77665544, 0x0F40) == 0x00004400
    assert library.permuted(0x00000080, 0, 0x8888) == 0xFFFFFFFF

"""What every generator promises: shapes, range, scale, gradients, errors, and bits that no batch or thread changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from cortexloop.evolve.generators import GENERATORS, Generator
from cortexloop.evolve.generators.base import CODE_RMS, squash

FORMULAS = ("fourier", "gabor", "cppn")
SMALL = {"fourier": 300, "gabor": 33, "cppn": 115}


def make(name: str, height: int = 13, width: int = 17, **options: Any) -> Generator:
    return GENERATORS[name](height, width, **{"dim": SMALL[name], **options})


def random_codes(count: int, dim: int, seed: int = 1) -> torch.Tensor:
    return CODE_RMS * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def restore_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


formulas = pytest.mark.parametrize("name", FORMULAS)


@formulas
def test_shape_type_and_range(name: str):
    generator = make(name)
    codes = random_codes(6, generator.dim)
    images = generator(codes)
    assert (generator.height, generator.width, generator.name) == (13, 17, name)
    assert images.shape == (6, 3, 13, 17)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(generator(codes.view(2, 3, -1)), images.view(2, 3, 3, 13, 17))
    assert torch.equal(generator(codes[4]), images[4])
    assert generator(codes[:0]).shape == (0, 3, 13, 17)
    assert generator(codes.view(2, 3, -1)[:, :0]).shape == (2, 0, 3, 13, 17)
    assert torch.equal(generator(codes.double()), images)
    assert generator(codes.half()).dtype == torch.float32
    wide = torch.cat((codes, codes), dim=1)[:, : generator.dim]  # not contiguous
    assert torch.equal(generator(wide), images)


@formulas
@pytest.mark.parametrize(("height", "width"), [(112, 112), (31, 64)])
def test_scale_of_codes(name: str, height: int, width: int):
    """Zeros are exactly mid-grey; codes of RMS 4.7 have natural contrast, and few pixels that are black or white."""
    found = []
    for seed in range(3):
        generator = GENERATORS[name](height, width, dim=None, seed=seed)
        assert torch.equal(generator(torch.zeros(2, generator.dim)), torch.full((2, 3, height, width), 0.5))
        images = generator(random_codes(40, generator.dim, seed)).double()
        assert ((images < 0.01) | (images > 0.99)).double().mean() < 0.01
        found.append(float((torch.logit(images.clamp(1e-6, 1 - 1e-6)) / 4).square().mean().sqrt()))
    assert min(found) > 0.19
    assert max(found) < 0.26


@formulas
@pytest.mark.parametrize("size", [(112, 112), (13, 17)])
def test_bits_depend_on_the_code_alone(
    name: str, size: tuple[int, int], restore_torch_threads: None, monkeypatch: pytest.MonkeyPatch
):
    generator = GENERATORS[name](*size, dim=None if size == (112, 112) and name != "gabor" else SMALL[name])
    codes = random_codes(41, generator.dim)
    torch.set_num_threads(1)
    alone = torch.cat([generator(code) for code in codes.split(1)])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for count in (1, 2, 3, 40, 41):
            assert torch.equal(generator(codes[:count]), alone[:count]), f"{threads} threads, {count} images"
        with monkeypatch.context() as patch:  # chunks of five, so that one image is left over
            patch.setattr(type(generator), "_cpu_pixels", 5 * size[0] * size[1])
            assert torch.equal(generator(codes), alone)
    assert torch.equal(generator(codes.flip(0)), alone.flip(0))
    followed = generator(codes.clone().requires_grad_())
    assert followed.requires_grad
    assert torch.equal(followed.detach(), alone)


@formulas
def test_gradient(name: str):
    """Against central differences along random directions, in float32: hence the tolerance."""
    generator = make(name)
    codes = random_codes(2, generator.dim).requires_grad_()
    weights = torch.randn(2, 3, 13, 17, generator=torch.Generator().manual_seed(5))
    (gradient,) = torch.autograd.grad((generator(codes) * weights).sum(), codes)
    for seed in range(4):
        direction = torch.randn(2, generator.dim, generator=torch.Generator().manual_seed(seed))
        step = 0.01
        ends = [(generator((codes + s * direction).detach()).double() * weights).sum() for s in (step, -step)]
        slope = float(ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=0.01, abs=0.01)
    (single,) = torch.autograd.grad((generator(codes[:1]) * weights[:1]).sum(), codes)
    assert torch.allclose(single[0], gradient[0], rtol=1e-4, atol=1e-6)
    assert torch.equal(single[1], torch.zeros(generator.dim))


@formulas
def test_no_graph_without_need_and_constants_made_in_inference_mode(name: str):
    generator = make(name)
    codes = random_codes(3, generator.dim)
    with torch.inference_mode():
        first = generator(codes)
    assert not generator(codes).requires_grad
    followed = generator(codes.clone().requires_grad_())
    followed.sum().backward()  # would fail if the constants were inference tensors
    assert torch.equal(first, followed.detach())
    with torch.no_grad():
        assert not generator(codes.clone().requires_grad_()).requires_grad


@formulas
def test_settings_make_the_same_generator_again(name: str):
    generator = make(name, seed=3) if name != "fourier" else make(name)
    settings = json.loads(json.dumps(generator.settings()))
    again = GENERATORS[settings.pop("generator")](**settings)
    codes = random_codes(3, generator.dim)
    assert torch.equal(again(codes), generator(codes))
    assert again.settings() == generator.settings()
    if name != "fourier":
        assert not torch.equal(make(name, seed=4)(codes), generator(codes))


@formulas
def test_errors(name: str):
    generator = make(name)
    dim = generator.dim
    for codes, message in (
        (torch.zeros(2, dim + 1), rf"codes should be \[\.\.\., {dim}\] for this generator, got \[2, {dim + 1}\]"),
        (torch.tensor(1.0), rf"codes should be \[\.\.\., {dim}\] for this generator, got \[\]"),
    ):
        with pytest.raises(ValueError, match=message):
            generator(codes)
    with pytest.raises(TypeError, match=rf"floating-point tensor \[\.\.\., {dim}\], got torch\.int64"):
        generator(torch.zeros(2, dim, dtype=torch.int64))
    with pytest.raises(TypeError, match="got ndarray"):
        generator(np.zeros((2, dim), np.float32))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"height should be a whole number, got 3\.5"):
        make(name, height=3.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width should be from 1 to 4096, got 0"):
        make(name, width=0)


@formulas
def test_one_row_and_one_pixel(name: str):
    for size in ((1, 1), (1, 9), (6, 1)):
        generator = GENERATORS[name](*size, dim=None)
        images = generator(random_codes(3, generator.dim))
        assert bool(images.isfinite().all())
        assert torch.equal(generator(torch.zeros(generator.dim)), torch.full((3, *size), 0.5))


def test_names():
    assert tuple(GENERATORS)[:3] == FORMULAS
    assert {"deepsim-fc6", "deepsim-fc7", "deepsim-fc8"} <= GENERATORS.keys()


def test_squash_is_the_logistic_function_with_the_same_bits_everywhere(restore_torch_threads: None):
    x = 4 * torch.randn(100_003, generator=torch.Generator().manual_seed(2))
    torch.set_num_threads(1)
    y = squash(x)
    np.testing.assert_allclose(y, 1 / (1 + np.exp(-x.double().numpy())), rtol=3e-7)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for count in (1, 31, 33, 32768, 65_537, 100_003):
            assert torch.equal(squash(x[:count].clone()), y[:count])
            out = torch.empty(count)
            assert squash(x[:count].clone(), out) is out
            assert torch.equal(out, y[:count])
    assert torch.equal(squash(torch.zeros(5)), torch.full((5,), 0.5))
    few = x[:40].double().requires_grad_()
    assert torch.autograd.gradcheck(squash, (few,))
    assert torch.autograd.gradgradcheck(squash, (few,))

"""Images on a canvas in degrees, and their conversion to what a screen shows."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cortexloop.evolve.placement import Placement, to_uint8


@pytest.fixture
def restore_torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


# --- placement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "position", "box"),
    [
        (4, (0, 0), (30, 80, 40, 40)),  # in the middle of 100 rows, 200 columns; 10 pixels per degree
        (4, (2, 1), (20, 100, 40, 40)),  # to the right and up
        (4, (-11, -5), (80, -30, 40, 40)),  # partly outside, left and below
        ((6, 3), (0, 0), (35, 70, 30, 60)),  # width, height
        (0.01, (0, 0), (50, 100, 1, 1)),  # never less than a pixel
        (0.3, (0, 0), (49, 99, 3, 3)),  # 48.5 and 98.5 are rounded up
    ],
)
def test_box(size: float, position: tuple[float, float], box: tuple[int, int, int, int]):
    placement = Placement((100, 200), pixels_per_degree=10, size=size, position=position)
    assert placement.box == box


def test_images_that_are_the_canvas_already():
    placement = Placement((20, 20), pixels_per_degree=5, size=4)
    images = random_images(2, 3, 20, 20)
    assert placement(images) is images
    assert Placement((20, 30), pixels_per_degree=5, size=(6, 4)).box == (0, 0, 20, 30)


def test_same_size_elsewhere():
    placement = Placement((10, 12), pixels_per_degree=1, size=4, position=(3, -2), background=(0, 51, 255))
    images = random_images(2, 5, 3, 4, 4)
    placed = placement(images)
    assert placed.shape == (2, 5, 3, 10, 12)
    top, left = 5, 7
    assert torch.equal(placed[..., top : top + 4, left : left + 4], images)
    outside = torch.ones(10, 12, dtype=torch.bool)
    outside[top : top + 4, left : left + 4] = False
    torch.testing.assert_close(placed[0, 0][:, outside], torch.tensor([[0.0], [0.2], [1.0]]).expand(3, 104))


def test_parts_outside_are_cut():
    images = random_images(1, 3, 6, 6)
    placed = Placement((8, 8), pixels_per_degree=1, size=6, position=(-3, 4))(images)
    assert torch.equal(placed[..., :3, :4], images[..., 3:, 2:])
    assert torch.equal(placed[..., 3:, :], torch.full((1, 3, 5, 8), 0.5))
    assert torch.equal(placed[..., :, 4:], torch.full((1, 3, 8, 4), 0.5))
    inside = Placement((4, 4), pixels_per_degree=1, size=6)(images)  # larger than the canvas on all sides
    assert torch.equal(inside, images[..., 1:5, 1:5])
    assert Placement((4, 4), pixels_per_degree=1, size=6).box == (-1, -1, 6, 6)


def test_resizing():
    """Halving with antialiasing by hand: weights 1, 3, 3, 1 of 8 inside, the triangle of two pixels' half-width."""
    row = random_images(1, 1, 1, 16)
    images = row.expand(1, 3, 16, 16)
    placed = Placement((8, 8), pixels_per_degree=1, size=8)(images)
    r = row[0, 0, 0]
    expected = (r[1:11] + 3 * r[2:12] + 3 * r[3:13] + r[4:14])[::2] / 8
    torch.testing.assert_close(placed[0, 0, 4, 1:6], expected)
    uniform = Placement((9, 9), pixels_per_degree=1, size=5)(torch.ones(1, 3, 17, 17))
    assert uniform.max() <= 1
    torch.testing.assert_close(uniform[0, :, 2:7, 2:7], torch.ones(3, 5, 5))
    fine = torch.arange(64).remainder(2).float().expand(1, 3, 64, 64)  # stripes that nearest neighbours would alias
    coarse = Placement((21, 21), pixels_per_degree=1, size=21)(fine)
    assert (coarse - 0.5).abs()[..., 1:-1].max() < 0.1


def test_a_box_of_one_pixel_more_is_rounding_and_more_is_an_error():
    placement = Placement((100, 100), pixels_per_degree=10, size=(6, 3))
    assert placement(random_images(1, 3, 15, 30)).shape == (1, 3, 100, 100)
    assert placement(random_images(1, 3, 31, 60)).shape == (1, 3, 100, 100)
    with pytest.raises(ValueError, match=r"images of 30 x 30 pixels would be stretched to 30 x 60; give size as"):
        placement(random_images(1, 3, 30, 30))


def test_each_image_by_itself(restore_torch_threads: None):
    placement = Placement((30, 30), pixels_per_degree=1, size=21, position=(4, 0))
    images = random_images(9, 3, 33, 33)
    torch.set_num_threads(1)
    alone = torch.cat([placement(image) for image in images.split(1)])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(placement(images), alone)
    assert torch.equal(placement(images[3]), alone[3])


def test_gradient():
    placement = Placement((12, 12), pixels_per_degree=1, size=6, position=(4, 0))
    images = random_images(2, 3, 9, 9).double().requires_grad_()
    assert torch.autograd.gradcheck(placement, (images,))


def test_placement_errors():
    message = "outside the canvas: it covers rows 3 to 6 and columns 10 to 13 of 10 x 10 pixels; check position"
    with pytest.raises(ValueError, match=message):
        Placement((10, 10), pixels_per_degree=1, size=4, position=(7, 0))
    Placement((10, 10), pixels_per_degree=1, size=4, position=(6, 0))  # one column is left
    with pytest.raises(ValueError, match="rows -4 to -1"):
        Placement((10, 10), pixels_per_degree=1, size=4, position=(0, 7))
    with pytest.raises(ValueError, match="more than 16384; check size"):
        Placement((10, 10), pixels_per_degree=1000, size=40)
    with pytest.raises(ValueError, match="canvas should be two numbers, got 10"):
        Placement(10, pixels_per_degree=1, size=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size should be a finite number above 0, got 0"):
        Placement((10, 10), pixels_per_degree=1, size=0)
    with pytest.raises(ValueError, match="position should be made of finite numbers, got nan"):
        Placement((10, 10), pixels_per_degree=1, size=4, position=(float("nan"), 0))
    for background in (256, (0, 0), (-1, 0, 0)):
        with pytest.raises(ValueError, match=r"background should be a grey level or \(R, G, B\) within 0\.\.255"):
            Placement((10, 10), pixels_per_degree=1, size=4, background=background)
    placement = Placement((10, 10), pixels_per_degree=1, size=4)
    with pytest.raises(ValueError, match=r"images should be \[\.\.\., 3, h, w\], got \[4, 4, 3\]"):
        placement(torch.zeros(4, 4, 3))
    with pytest.raises(TypeError, match=r"floating-point tensor \[\.\.\., 3, h, w\], got torch\.uint8"):
        placement(torch.zeros(3, 4, 4, dtype=torch.uint8))


def test_settings_make_the_same_placement_again():
    placement = Placement((10, 20), pixels_per_degree=2.5, size=(6, 3), position=(0.5, -1), background=(0, 1, 2))
    settings = json.loads(json.dumps(placement.settings()))
    again = Placement(settings.pop("canvas"), **settings)
    assert again.box == placement.box
    images = random_images(1, 3, 6, 12)
    assert torch.equal(again(images), placement(images))
    assert again.settings() == placement.settings()


# --- to_uint8 -------------------------------------------------------------------------------------------------------


def test_levels_by_hand():
    """Half to even, clamped."""
    values = torch.tensor([0.0, 1.0, 0.5 / 255, 1.5 / 255, 2.5 / 255, 100.4 / 255, 100.6 / 255, -0.2, 1.2, 254.5 / 255])
    levels = to_uint8(values.expand(1, 3, 1, 10))
    assert levels.shape == (1, 1, 10, 3)
    assert levels.dtype == torch.uint8
    assert levels.is_contiguous()
    halves = (values * 255).double()
    assert halves[2] == 0.5  # exactly half, so that the rule is tested
    assert halves[9] == 254.5
    assert levels[0, 0, :, 0].tolist() == [0, 255, 0, 2, 2, 100, 101, 0, 255, 254]


def test_every_level_comes_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(levels / 255)[0, ..., 1], levels[0, 0])


def test_equals_numpy_for_any_shape_and_type():
    for shape in ((3, 5, 7), (2, 3, 5, 7), (3, 6, 3, 4, 5), (0, 3, 4, 4), (2, 0, 3, 4, 4), (40, 3, 9, 9)):
        images = random_images(*shape) * 1.4 - 0.2
        expected = np.clip(np.rint(images.numpy() * np.float32(255)), 0, 255).astype(np.uint8)
        expected = np.moveaxis(expected, -3, -1)
        np.testing.assert_array_equal(to_uint8(images), expected, strict=True)
        np.testing.assert_array_equal(to_uint8(images.transpose(-1, -2)), np.swapaxes(expected, -2, -3))
        np.testing.assert_array_equal(to_uint8(images.double()), expected)
    assert to_uint8(random_images(2, 3, 4, 4).half()).shape == (2, 4, 4, 3)


def test_images_of_any_batch_alike(restore_torch_threads: None):
    images = random_images(41, 3, 13, 11) * 1.2
    before = images.clone()
    torch.set_num_threads(1)
    alone = torch.cat([to_uint8(image) for image in images.split(1)])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for count in (1, 2, 15, 16, 17, 41):
            assert torch.equal(to_uint8(images[:count]), alone[:count])
    assert torch.equal(images, before)  # the input is left as it is
    assert not to_uint8(images.requires_grad_()).requires_grad


def test_to_uint8_errors():
    with pytest.raises(TypeError, match=r"got torch\.uint8"):
        to_uint8(torch.zeros(3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images should be \[\.\.\., 3, h, w\], got \[4, 4\]"):
        to_uint8(torch.zeros(4, 4))

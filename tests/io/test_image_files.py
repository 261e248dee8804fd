from __future__ import annotations

import io
import json
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cortexloop.io import ImageError, image_number, open_images
from cortexloop.io import images as module

DATA = Path(os.environ.get("CORTEXLOOP_V4_DATA", Path(__file__).parents[3] / "shared" / "data" / "v4_compact"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the V4 data pack is not here (set CORTEXLOOP_V4_DATA)")


def pixels(n=1, height=8, width=10, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def encoded(array, kind="PNG", **options):
    buffer = io.BytesIO()
    picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(folder, images, names=None):
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        (folder / (names[i] if names else f"image{i + 1:04d}.png")).write_bytes(encoded(image))
    return folder


def read(source, n=4):
    names, batches = [], []
    for batch_names, batch in source.batches(n):
        names += batch_names
        batches.append(batch)
    return names, np.concatenate(batches)


def test_folder_in_numeric_order(tmp_path):
    images = pixels(12)
    folder = write_folder(tmp_path / "f", images, [f"image{i + 1}.png" for i in range(12)])
    (folder / "notes.txt").write_text("not a picture")
    (folder / ".hidden.png").write_bytes(b"nothing")
    source = open_images(folder)
    assert (len(source), source.height, source.width) == (12, 8, 10)
    assert source.names == tuple(f"image{i + 1}.png" for i in range(12))
    names, got = read(source, n=5)
    assert names == list(source.names)
    np.testing.assert_array_equal(got, images)
    assert [len(b) for _, b in source.batches(5)] == [5, 5, 2]
    np.testing.assert_array_equal(read(source, n=100)[1], images)


def test_sub_folders_are_searched(tmp_path):
    images = pixels(2)
    write_folder(tmp_path / "f", images[:1], ["b.png"])
    write_folder(tmp_path / "f" / "a", images[1:], ["z.png"])
    assert open_images(tmp_path / "f").names == ("a/z.png", "b.png")


def test_zip_by_number_not_by_archive_order(tmp_path):
    images = pixels(11)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("pictures/", b"")
        for i in (3, 10, 0, 7, 1, 2, 4, 9, 5, 8, 6):
            archive.writestr(f"pictures/image{i + 1:d}.png", encoded(images[i]))
        archive.writestr("__MACOSX/pictures/._image1.png", b"resource fork")
        archive.writestr("readme.md", b"")
    names, got = read(open_images(tmp_path / "z.zip"), n=3)
    assert names[1] == "pictures/image2.png"
    np.testing.assert_array_equal(got, images)


def test_image_number():
    assert image_number("folder12/image0034.jpg") == 34
    assert image_number("face.png") is None


def test_single_picture(tmp_path):
    image = pixels()[0]
    (tmp_path / "one.png").write_bytes(encoded(image))
    names, got = read(open_images(tmp_path / "one.png"))
    assert names == ["one.png"]
    np.testing.assert_array_equal(got[0], image)


@pytest.mark.parametrize("suffix", ["npy", "npz", "compressed"])
def test_array_files(tmp_path, suffix):
    images = pixels(7)
    if suffix == "npy":
        path = tmp_path / "a.npy"
        np.save(path, images)
    else:
        path = tmp_path / "a.npz"
        (np.savez if suffix == "npz" else np.savez_compressed)(path, images=images, other=np.arange(3))
    source = open_images(path, size=(8, 10))
    assert len(source) == 7
    assert source.names[3] == "3"
    names, got = read(source, n=3)
    assert names == [str(i) for i in range(7)]
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, images)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_channels_first_arrays_on_request(tmp_path, suffix):
    images = pixels(3)
    path = tmp_path / f"a.{suffix}"
    (np.save if suffix == "npy" else np.savez)(path, images.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(read(open_images(path, layout="NCHW", size=(8, 10)))[1], images)
    with pytest.raises(ValueError, match=r"layout should be .* got 'HWC'"):
        open_images(path, layout="HWC")
    with pytest.raises(ValueError, match=r"for .npy and .npz files only"):
        open_images(tmp_path, layout="NCHW")


def test_fortran_order_npy(tmp_path):
    images = pixels(3)
    np.save(tmp_path / "a.npy", np.asfortranarray(images))
    np.testing.assert_array_equal(read(open_images(tmp_path / "a.npy"))[1], images)


def test_key_chooses_an_array_of_an_npz(tmp_path):
    a, b = pixels(2, seed=1), pixels(2, seed=2)
    np.savez(tmp_path / "a.npz", a=a, b=b)
    with pytest.raises(ValueError, match="several: a, b; give its key"):
        open_images(tmp_path / "a.npz")
    np.testing.assert_array_equal(read(open_images(tmp_path / "a.npz", key="b"))[1], b)
    with pytest.raises(ValueError, match="no array 'c'; it has a, b"):
        open_images(tmp_path / "a.npz", key="c")


def test_recentred_floats_need_the_flag_and_no_nan(tmp_path):
    values = pixels(5).astype(np.float64) - 110
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ValueError, match=r"uint8 with RGB 0\.\.255, got float64; save RGB"):
        open_images(tmp_path / "a.npy")
    _, got = read(open_images(tmp_path / "a.npy", recentred=True), n=2)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, values.astype(np.float32))
    values[3, 0, 0, 0] = np.nan
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ImageError, match="image '3': contains NaN"):
        read(open_images(tmp_path / "a.npy", recentred=True), n=2)
    source = open_images(tmp_path / "a.npy", recentred=True, on_error="skip")
    names, got = read(source, n=2)
    assert names == ["0", "1", "2", "4"]
    assert [s.name for s in source.skipped] == ["3"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), r"shape \[N, H, W, 3\], got \[4, 4, 3\]; save a single image as image\[None\]"),
        (np.zeros((2, 3, 4, 4), np.uint8), 'say that its layout is "NCHW"'),
        (np.zeros((2, 4, 4), np.uint8), r"shape \[N, H, W, 3\], got \[2, 4, 4\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), "contains no images"),
        (np.zeros((2, 4, 4, 3), np.int64), r"got int64; save it with images\.astype"),
        (np.array([{}, None]), "no readable .npy file"),
    ],
    ids=["single", "channels first", "grey", "empty", "int64", "objects"],
)
def test_unsuitable_arrays(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        open_images(tmp_path / "a.npy")


def test_array_of_another_size(tmp_path):
    np.save(tmp_path / "a.npy", pixels(2))
    with pytest.raises(ValueError, match=r"are 8 x 10 pixels .*expected 112 x 112"):
        open_images(tmp_path / "a.npy", size=(112, 112))


def test_grey_palette_and_opaque_alpha_become_rgb(tmp_path):
    grey = pixels()[0, :, :, 0]
    folder = write_folder(tmp_path / "f", [grey])
    opaque = np.dstack([pixels(seed=1)[0], np.full((8, 10), 255, np.uint8)])
    (folder / "image0002.png").write_bytes(encoded(opaque))
    palette = Image.fromarray(pixels(seed=2)[0]).quantize(16)
    (folder / "image0003.png").write_bytes(encoded(palette))
    _, got = read(open_images(folder))
    np.testing.assert_array_equal(got[0], np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(got[1], opaque[..., :3])
    np.testing.assert_array_equal(got[2], np.asarray(palette.convert("RGB")))


def two_frames():
    frames = [Image.fromarray(p) for p in pixels(2)]
    return encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])


BAD_PICTURES = {
    "transparent": (encoded(np.full((8, 10, 4), 128, np.uint8)), "partly transparent"),
    "cmyk": (encoded(Image.new("CMYK", (10, 8)), "JPEG"), "colour mode CMYK"),
    "16 bit": (encoded(np.zeros((8, 10), np.uint16)), "colour mode I;16"),
    "frames": (two_frames(), "several frames"),
    "text": (b"this is no picture", "not a picture"),
    "empty": (b"", "not a picture"),
    "truncated": (encoded(pixels(1, 64, 64)[0], "JPEG")[:900], "8 x 10|cannot be decoded"),
    "other size": (encoded(pixels(1, 9, 10)[0]), r"is 9 x 10 pixels \(height x width\), expected 8 x 10"),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_one_bad_picture_is_named_or_skipped_and_listed(tmp_path, kind):
    data, message = BAD_PICTURES[kind]
    images = pixels(5)
    folder = write_folder(tmp_path / "f", images)
    (folder / "image0003.png").write_bytes(data)
    source = open_images(folder)
    with pytest.raises(ImageError, match=rf"image 'image0003\.png': .*({message})"):
        read(source)
    source = open_images(folder, on_error="skip")
    names, got = read(source, n=2)
    assert names == ["image0001.png", "image0002.png", "image0004.png", "image0005.png"]
    np.testing.assert_array_equal(got, images[[0, 1, 3, 4]])
    assert [s.name for s in source.skipped] == ["image0003.png"]
    read(source)
    assert len(source.skipped) == 1


@pytest.mark.parametrize("cut", [10, 300, 1500])
def test_truncated_jpeg(tmp_path, cut):
    data = encoded(pixels(1, 64, 64)[0], "JPEG")
    (tmp_path / "a.jpg").write_bytes(data[:cut])
    with pytest.raises(ImageError, match=r"'a.jpg': (cannot be decoded|is not a picture)"):
        open_images(tmp_path / "a.jpg", size=(64, 64)).batches(1).__next__()


def test_bad_first_picture_and_nothing_but_bad_pictures(tmp_path):
    folder = write_folder(tmp_path / "f", pixels(2))
    (folder / "image0001.png").write_bytes(b"")
    with pytest.raises(ImageError, match="image0001"):
        open_images(folder)
    assert read(open_images(folder, on_error="skip"))[0] == ["image0002.png"]
    (folder / "image0002.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 2 images .*image0001"):
        open_images(folder, on_error="skip")
    with pytest.raises(ValueError, match=r"none of the 2 images .*image0001"):
        read(open_images(folder, on_error="skip", size=(8, 10)))


def test_resize_is_pillows_bicubic_and_only_on_request(tmp_path):
    images = pixels(1, 20, 30)
    folder = write_folder(tmp_path / "f", images)
    with pytest.raises(ValueError, match="needs size"):
        open_images(folder, resize=True)
    _, got = read(open_images(folder, size=(8, 10), resize=True))
    expected = Image.fromarray(images[0]).resize((10, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(got[0], np.asarray(expected))


def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "f", pixels(1, 40, 40))
    monkeypatch.setattr(module, "MAX_PIXELS", 1000)
    with pytest.raises(ImageError, match="40 x 40 pixels, more than the 1,000"):
        read(open_images(folder, size=(8, 8), resize=True))


def test_too_large_files_are_refused_before_reading(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "f", pixels(1))
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(100_000))
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 50)
    for source in (folder, tmp_path / "z.zip"):
        with pytest.raises(ImageError, match="MiB"):
            open_images(source)


def test_unusable_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="contains no pictures"):
        open_images(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="is no source of images"):
        open_images(tmp_path / "a.txt")
    for name in ("a.zip", "a.npz", "a.npy"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 and then nothing")
        with pytest.raises(ValueError, match="is no readable"):
            open_images(tmp_path / name)
    with pytest.raises(ValueError, match="recentred values come from"):
        open_images(tmp_path / "a.zip", recentred=True)
    with pytest.raises(ValueError, match="on_error"):
        open_images(tmp_path, on_error="ignore")


@pytest.mark.parametrize("kind", ["npy", "npz", "zip"])
def test_truncated_and_flipped_archives_raise_value_error(tmp_path, kind):
    images = pixels(6, 16, 16)
    path = tmp_path / f"a.{kind}"
    if kind == "npy":
        np.save(path, images)
    elif kind == "npz":
        np.savez_compressed(path, images=images // 32)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for i in range(6):
                archive.writestr(f"{i}.png", encoded(images[i]))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for trial in range(80):
        data = bytearray(whole)
        if trial % 2:
            data = data[: rng.integers(len(data))]
        else:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            read(open_images(path))
        except ValueError as error:
            assert len(str(error)) > 10  # noqa: PT017 - intact data may also come out: a flipped pixel is no error in .npy


def test_batches_can_be_left_early_and_taken_again(tmp_path):
    source = open_images(write_folder(tmp_path / "f", pixels(9)))
    iterator = source.batches(2)
    first = next(iterator)[1]
    iterator.close()
    np.testing.assert_array_equal(next(source.batches(2))[1], first)
    with pytest.raises(ValueError, match="batch size"):
        next(source.batches(0))


@pytest.mark.parametrize("kind", ["npy", "npz", "zip"])
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, kind):
    height = width = 64
    batch_bytes = 8 * height * width * 3

    def peak(n):
        path = tmp_path / f"{n}.{kind}"
        if kind == "zip":
            data = encoded(pixels(1, height, width)[0], "JPEG")
            with zipfile.ZipFile(path, "w") as archive:
                for i in range(n):
                    archive.writestr(f"{i}.jpg", data)
        else:
            (np.save if kind == "npy" else np.savez_compressed)(path, np.zeros((n, height, width, 3), np.uint8))
        source = open_images(path)
        next(source.batches(8))
        tracemalloc.start()
        try:
            assert sum(len(names) for names, _ in source.batches(8)) == n
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(800) < 6 * batch_bytes  # the whole would be 100 batches


@needs_data
@pytest.mark.parametrize("session", ["190923", "201025", "210325"])
def test_published_images_decode_to_the_pixels_of_the_references(session):
    with np.load(DATA / "reference_predictions.npz") as pack:
        rows = pack["image_source"][:, 0] == int(session)
        wanted = dict(zip(pack["image_source"][rows, 1].tolist(), pack["images_uint8"][rows], strict=True))
    seen = 0
    source = open_images(DATA / f"images_{session}.zip", size=(112, 112))
    assert [image_number(name) for name in source.names] == list(range(1, len(source) + 1))
    for names, batch in source.batches(64):
        for name, image in zip(names, batch, strict=True):
            if image_number(name) in wanted:
                np.testing.assert_array_equal(image, wanted[image_number(name)])
                seen += 1
    assert seen == 16


@needs_data
def test_published_archives_have_the_recorded_number_of_images():
    manifest = json.loads((DATA / "images_manifest.json").read_text())
    assert manifest
    assert len(open_images(DATA / "images_190923.zip")) == 1200

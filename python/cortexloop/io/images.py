"""Stream RGB images from a folder, a zip, an array file or a single picture, a batch at a time.

Pictures are decoded by Pillow with libjpeg-turbo's defaults, which the published compact models were made with; another
decoder changes pixels by a few levels. What is stored is what comes out: colour profiles and EXIF rotation are ignored.
Decoding runs in threads ahead of the consumer, and no more than about two batches are in memory at any time.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cortexloop.io.paths import natural_key

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
"""Files of a folder or zip with other suffixes are not images and are left alone."""

MAX_PIXELS = 64_000_000
"""Pictures with more pixels are refused before decoding: a few compressed kilobytes can ask for gigabytes."""

MAX_FILE_BYTES = 256 * 2**20
"""Pictures in larger files (or zip members that claim so) are refused before they are read."""

_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
_PLAIN_MODES = ("RGB", "L", "1", "P")


class ImageError(ValueError):
    """One image that cannot be used: `name` of the image and the `reason`, as one sentence together."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"image {name!r}: {reason}")
        self.name = name
        self.reason = reason


@dataclass(frozen=True)
class SkippedImage:
    """An image left out with `on_error="skip"`."""

    name: str
    reason: str


@dataclass(eq=False)
class ImageSource(ABC):
    """Images of one size in a fixed order. `batches(n)` may be called again and starts from the first image.

    Attributes:
        path: where the images come from.
        height, width: size of every image that comes out, in pixels.
        skipped: images left out by the most recent `batches` (only with `on_error="skip"`).
    """

    path: Path
    skip: bool
    height: int = 0
    width: int = 0
    skipped: list[SkippedImage] = field(default_factory=list)

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """Name of each image, in the order in which they come (those to be skipped included)."""

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def _arrays(self, ahead: int) -> Iterator[NDArray[Any] | ImageError]:
        """Each image [H, W, 3] in order, or why it cannot be used; at most `ahead` are prepared in advance."""

    def batches(self, n: int) -> Iterator[tuple[list[str], NDArray[Any]]]:
        """Yield (names, pixels) with pixels uint8 [b, H, W, 3], RGB 0..255, b = n except in the last batch.

        A source opened with `recentred=True` gives float32 recentred values instead. Every batch is a new array.

        Raises:
            ValueError: n < 1; with `on_error="raise"` an image that cannot be used (`ImageError`);
                with `on_error="skip"` that not one image could be used.
        """
        if n < 1:
            raise ValueError(f"the batch size should be at least 1, got {n}")
        self.skipped = []
        names: list[str] = []
        pixels: NDArray[Any] | None = None
        anything = False
        for name, image in zip(self.names, self._arrays(n), strict=True):
            if isinstance(image, ImageError):
                if not self.skip:
                    raise image
                self.skipped.append(SkippedImage(image.name, image.reason))
                continue
            if pixels is None:
                pixels = np.empty((n, self.height, self.width, 3), image.dtype)
            pixels[len(names)] = image
            names.append(name)
            if len(names) == n:
                anything = True
                yield names, pixels
                names, pixels = [], None
        if pixels is not None:
            anything = True
            yield names, pixels[: len(names)]
        if not anything:
            first = f"; the first: {self.skipped[0].name!r}: {self.skipped[0].reason}" if self.skipped else ""
            raise ValueError(f"none of the {len(self)} images of {str(self.path)!r} can be used{first}")


def open_images(
    source: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    resize: bool = False,
    recentred: bool = False,
    key: str | None = None,
    layout: str = "NHWC",
    on_error: Literal["raise", "skip"] = "raise",
) -> ImageSource:
    """Open images for streaming.

    Args:
        source: a folder (searched with its sub-folders) or a .zip of pictures, in numeric order of their names
            (`image2.jpg` before `image10.jpg`, whatever the order on the disk or in the archive; names are paths
            relative to the folder); one picture; or an array file, .npy (memory-mapped) or .npz (streamed),
            uint8 [N, H, W, 3] with RGB 0..255, whose images are called "0", "1", ...
        size: (height, width) that every image should have; None: that of the first image.
        resize: bring pictures of other sizes to `size` with Pillow's bicubic filter, each axis on its own (array
            files are never resized). Otherwise another size is an error of that image.
        recentred: the array file holds float values already recentred by the image mean (about -116..155), which are
            given out as float32. Without it float arrays are refused, because nothing tells 0..1 from 0..255.
        layout: order of the axes of an array file, "NHWC" or "NCHW" ([N, 3, H, W]); what comes out is NHWC.
        key: name of the array in an .npz; None: the only one that can be images.
        on_error: "raise" names the first image that cannot be used, "skip" leaves such images out and lists them.

    Grey pictures get three equal channels. Transparency is accepted only where nothing is transparent: what shows
    through is a choice that belongs to the experimenter. Pictures that are not 8-bit grey or RGB (CMYK, 16 bit,
    several frames) are refused.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: an unreadable source, no image in it, a wrong shape, dtype or size.
    """
    path = Path(source)
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error should be "raise" or "skip", got {on_error!r}')
    if layout not in ("NHWC", "NCHW"):
        raise ValueError(f'layout should be "NHWC" or "NCHW", got {layout!r}')
    if resize and size is None:
        raise ValueError("resize=True needs size=(height, width)")
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder of images: {str(path)!r}")
    skip = on_error == "skip"
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz") and path.is_file():
        array = _NpyRows(path) if suffix == ".npy" else _NpzRows(path, key, layout)
        return _ArraySource(path, skip, rows=array, recentred=recentred, layout=layout).checked(size)
    if recentred:
        raise ValueError(f"recentred values come from .npy or .npz files only, not from {str(path)!r}")
    if layout != "NHWC":
        raise ValueError(f"layout {layout!r} is for .npy and .npz files only, not for {str(path)!r}")
    if path.is_dir():
        files: _Files = _FolderFiles(path)
    elif suffix == ".zip":
        files = _ZipFiles(path)
    elif suffix in IMAGE_SUFFIXES:
        files = _SingleFile(path)
    else:
        raise ValueError(
            f"{str(path)!r} is no source of images: expected a folder, .zip, .npy, .npz or a picture "
            f"({', '.join(IMAGE_SUFFIXES)})"
        )
    if not files.names:
        raise ValueError(f"{str(path)!r} contains no pictures (looked for {', '.join(IMAGE_SUFFIXES)})")
    return _PictureSource(path, skip, files=files, resize=resize).measured(size)


def image_number(name: str) -> int | None:
    """The number at the end of a file name without its suffix ("images/image0012.jpg" -> 12), None without one."""
    found = re.search(r"(\d+)$", Path(name).stem)
    return int(found.group(1)) if found else None


# --------------------------------------------------------------------------------------------------- pictures


class _Files(ABC):
    """Named encoded pictures; `read` is called from several threads."""

    names: tuple[str, ...]

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The encoded picture. Raises ImageError."""


def _is_picture(name: str) -> bool:
    """By suffix, and neither hidden nor one of the resource forks that macOS puts into zips."""
    parts = name.split("/")
    return Path(name).suffix.lower() in IMAGE_SUFFIXES and not any(p.startswith(".") or p == "__MACOSX" for p in parts)


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: (natural_key(name.casefold()), name)))


class _FolderFiles(_Files):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found: list[str] = []
        for where, _, files in os.walk(folder, followlinks=True):
            relative = Path(where).relative_to(folder)
            found.extend(name for name in ((relative / file).as_posix() for file in files) if _is_picture(name))
        self.names = _ordered(found)

    def read(self, name: str) -> bytes:
        return _read_file(self.folder / name, name)


class _SingleFile(_Files):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.names = (path.name,)

    def read(self, name: str) -> bytes:
        return _read_file(self.path, name)


def _read_file(path: Path, name: str) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ImageError(name, f"the file is larger than {MAX_FILE_BYTES // 2**20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(name, f"cannot be read ({error.strerror})") from error


class _ZipFiles(_Files):
    def __init__(self, path: Path) -> None:
        try:
            self.archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{str(path)!r} is no readable zip archive ({error}); it may be truncated, copy it again"
            ) from error
        self.members = {info.filename: info for info in self.archive.infolist() if _is_picture(info.filename)}
        self.names = _ordered(self.members)

    def read(self, name: str) -> bytes:
        info = self.members[name]
        if info.flag_bits & 0x1:
            raise ImageError(name, "is encrypted; unpack the archive first")
        if info.file_size > MAX_FILE_BYTES:
            raise ImageError(name, f"claims more than {MAX_FILE_BYTES // 2**20} MiB in the archive")
        try:
            with self.archive.open(info) as member:
                return member.read(MAX_FILE_BYTES)
        except Exception as error:  # zipfile passes on whatever its decompressors raise on damaged data
            raise ImageError(name, f"cannot be read from the archive ({error})") from error


def decode_image(data: bytes, name: str, size: tuple[int, int] | None, resize: bool) -> NDArray[np.uint8]:
    """Decode one encoded picture to uint8 [H, W, 3] RGB; see `open_images` for what is accepted.

    Raises:
        ImageError: not a picture, damaged, of an unsuitable kind, or of another size and not to be resized.
    """
    try:
        # The size is checked from the header, before any pixel is decoded.
        with Image.open(io.BytesIO(data)) as picture:
            width, height = picture.size
            if size is not None and (height, width) != size and not resize:
                raise ImageError(
                    name,
                    f"is {height} x {width} pixels (height x width), expected {size[0]} x {size[1]}; "
                    "resizing has to be asked for (resize=True, or --resize)",
                )
            if height * width > MAX_PIXELS:
                raise ImageError(name, f"has {height} x {width} pixels, more than the {MAX_PIXELS:,} admitted")
            if getattr(picture, "is_animated", False):
                raise ImageError(name, "has several frames; save one of them as a picture of its own")
            rgb = _to_rgb(picture, name)
            if size is not None and (height, width) != size:
                rgb = rgb.resize((size[1], size[0]), Image.Resampling.BICUBIC)
            return np.array(rgb, dtype=np.uint8)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(name, "is not a picture that can be decoded") from error
    except Exception as error:  # Pillow's decoders raise every kind of exception on damaged data
        raise ImageError(name, f"cannot be decoded ({error})") from error


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    if picture.mode in _ALPHA_MODES or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            raise ImageError(name, "is partly transparent; put it on a background of your choice first")
        return rgba.convert("RGB")
    if picture.mode not in _PLAIN_MODES:
        raise ImageError(name, f"has colour mode {picture.mode}, expected 8-bit grey or RGB; convert it first")
    return picture.convert("RGB")


@dataclass(eq=False)
class _PictureSource(ImageSource):
    files: _Files = field(kw_only=True)
    resize: bool = field(kw_only=True)

    @property
    def names(self) -> Sequence[str]:
        return self.files.names

    def measured(self, size: tuple[int, int] | None) -> _PictureSource:
        """Settle height and width: the given ones, or those of the first picture that can be decoded."""
        if size is not None:
            self.height, self.width = size
            return self
        first: ImageError | None = None
        for name in self.files.names:
            image = self._decode(name, None)
            if not isinstance(image, ImageError):
                self.height, self.width = image.shape[:2]
                return self
            if not self.skip:
                raise image
            first = first or image
        raise ValueError(f"none of the {len(self)} images of {str(self.path)!r} can be used; the first: {first}")

    def _decode(self, name: str, size: tuple[int, int] | None) -> NDArray[np.uint8] | ImageError:
        try:
            return decode_image(self.files.read(name), name, size, self.resize)
        except ImageError as error:
            return error

    def _arrays(self, ahead: int) -> Iterator[NDArray[Any] | ImageError]:
        size = self.height, self.width
        yield from _prefetch(lambda name: self._decode(name, size), self.files.names, ahead)


def _prefetch(work: Callable[[str], Any], items: Sequence[str], ahead: int) -> Iterator[Any]:
    """`map(work, items)` by a few threads, in order, with at most `ahead` results waiting."""
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="cortexloop-decode")
    waiting: deque[Future[Any]] = deque()
    remaining = iter(items)
    try:
        for item in remaining:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ----------------------------------------------------------------------------------------------------- arrays


class _RowNames(Sequence[str]):
    """ "0", "1", ... without keeping half a million strings."""

    def __init__(self, n: int) -> None:
        self._range = range(n)

    def __len__(self) -> int:
        return len(self._range)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [str(i) for i in self._range[index]]
        return str(self._range[index])


class _Rows(ABC):
    """An array [N, ...] read from the front, a chunk of rows at a time."""

    where: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def chunks(self, n: int) -> Iterator[NDArray[Any]]:
        """All rows in order, n at a time."""


class _NpyRows(_Rows):
    def __init__(self, path: Path) -> None:
        self.where = repr(str(path))
        try:
            self.array = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # a damaged header makes NumPy's parser raise many kinds of exception
            raise ValueError(f"{self.where} is no readable .npy file ({error})") from error
        self.shape, self.dtype = self.array.shape, self.array.dtype

    def chunks(self, n: int) -> Iterator[NDArray[Any]]:
        for start in range(0, self.shape[0], n):
            yield np.ascontiguousarray(self.array[start : start + n])


class _NpzRows(_Rows):
    """One member of an .npz, decompressed as a stream: `numpy.load` would hold the whole array."""

    def __init__(self, path: Path, key: str | None, layout: str) -> None:
        try:
            self.archive = zipfile.ZipFile(path)
            headers = {
                name.removesuffix(".npy"): self._header(name)
                for name in self.archive.namelist()
                if name.endswith(".npy")
            }
        except OSError:
            raise
        except Exception as error:  # zipfile and NumPy raise many kinds of exception on damaged data
            raise ValueError(f"{str(path)!r} is no readable .npz file ({error})") from error
        if key is None:
            channels = 3 if layout == "NHWC" else 1
            fitting = [name for name, (shape, _, _) in headers.items() if len(shape) == 4 and shape[channels] == 3]
            if len(fitting) != 1:
                found = "none" if not fitting else "several: " + ", ".join(fitting)
                raise ValueError(f"{str(path)!r} should contain one array of images, found {found}; give its key")
            key = fitting[0]
        if key not in headers:
            raise ValueError(f"{str(path)!r} has no array {key!r}; it has {', '.join(headers) or 'none'}")
        self.member = f"{key}.npy"
        self.where = f"array {key!r} of {str(path)!r}"
        self.shape, fortran, self.dtype = headers[key]
        if fortran:
            raise ValueError(f"{self.where} is in Fortran order; save numpy.ascontiguousarray(images)")
        if self.dtype.hasobject:
            raise ValueError(f"{self.where} holds Python objects; save a plain uint8 array")

    def _header(self, member: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        with self.archive.open(member) as stream:
            return _read_npy_header(stream)

    def chunks(self, n: int) -> Iterator[NDArray[Any]]:
        row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        try:
            with self.archive.open(self.member) as stream:
                _read_npy_header(stream)
                for start in range(0, self.shape[0], n):
                    rows = min(n, self.shape[0] - start)
                    data = bytearray(rows * row_bytes)
                    view = memoryview(data)
                    while view:
                        got = stream.readinto(view)  # type: ignore[attr-defined]
                        if not got:
                            raise EOFError("the data ends too early")
                        view = view[got:]
                    yield np.frombuffer(data, self.dtype).reshape(rows, *self.shape[1:])
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
            raise ValueError(f"{self.where} cannot be read to its end ({error})") from error


def _read_npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


@dataclass(eq=False)
class _ArraySource(ImageSource):
    rows: _Rows = field(kw_only=True)
    recentred: bool = field(kw_only=True)
    layout: str = field(kw_only=True)

    def checked(self, size: tuple[int, int] | None) -> _ArraySource:
        shape, dtype, where = self.rows.shape, self.rows.dtype, self.rows.where
        channels, other = (3, 1) if self.layout == "NHWC" else (1, 3)
        if len(shape) != 4 or shape[channels] != 3:
            wanted = "[N, H, W, 3]" if self.layout == "NHWC" else "[N, 3, H, W]"
            if len(shape) == 3 and shape[channels - 1] == 3:
                advice = "; save a single image as image[None]"
            elif len(shape) == 4 and shape[other] == 3:
                advice = f'; say that its layout is "{"NCHW" if self.layout == "NHWC" else "NHWC"}"'
            else:
                advice = ""
            raise ValueError(f"{where} should have shape {wanted}, got {list(shape)}{advice}")
        if 0 in shape:
            raise ValueError(f"{where} contains no images: its shape is {list(shape)}")
        height, width = shape[1:3] if self.layout == "NHWC" else shape[2:4]
        if self.recentred and dtype not in (np.float32, np.float64):
            raise ValueError(f"{where} should hold recentred float32 or float64 values, got {dtype}")
        if not self.recentred and dtype != np.uint8:
            if dtype.kind == "f":
                advice = "save RGB 0..255 as uint8, or say that the values are recentred already"
            else:
                advice = "save it with images.astype(numpy.uint8)"
            raise ValueError(f"{where} should be uint8 with RGB 0..255, got {dtype}; {advice}")
        if size is not None and (height, width) != tuple(size):
            raise ValueError(
                f"images of {where} are {height} x {width} pixels (height x width), expected {size[0]} x {size[1]}"
            )
        self.height, self.width = height, width
        return self

    @property
    def names(self) -> Sequence[str]:
        return _RowNames(self.rows.shape[0])

    def _arrays(self, ahead: int) -> Iterator[NDArray[Any] | ImageError]:
        first = 0
        for stored in self.rows.chunks(ahead):
            chunk = stored if self.layout == "NHWC" else stored.transpose(0, 2, 3, 1)
            if self.recentred:
                finite = np.isfinite(chunk).all(axis=(1, 2, 3))
                for i, image in enumerate(chunk.astype(np.float32, copy=False)):
                    yield image if finite[i] else ImageError(str(first + i), "contains NaN or infinity")
            else:
                yield from chunk
            first += len(chunk)

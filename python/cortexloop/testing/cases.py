"""Problem sizes that reach every branch of a kernel: remainders of vectors, borders, strides, depths, mixed banks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Filters, kernel size and stride of each layer, first layer first."""

    filters: tuple[int, ...]
    kernels: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A bank and a batch; everything random about them follows from `seed`."""

    name: str
    batch: int
    height: int
    width: int
    models: tuple[ModelShape, ...]
    seed: int = 0

    def __str__(self) -> str:
        return self.name


def published(*filters: int) -> ModelShape:
    """The architecture of the published models."""
    return ModelShape(filters, (5, 5, 5, 5, 5), (1, 2, 2, 1, 1))


_MIXED = (
    ModelShape((3,), (5,), (1,)),
    ModelShape((17, 7), (5, 3), (1, 2)),
    ModelShape((16, 1, 33), (3, 5, 5), (2, 1, 1)),
    ModelShape((7, 49, 3, 16), (7, 5, 1, 5), (1, 2, 2, 1)),
    published(18, 20, 3, 5, 3),
)

CASES: tuple[Case, ...] = (
    Case("1x1-one-filter", 3, 1, 1, (ModelShape((1,), (1,), (1,)),)),
    Case("1x1-deep", 2, 1, 1, (published(3, 7, 3, 16, 3),)),
    Case("1x1-stride-2", 2, 1, 1, (ModelShape((7, 3), (5, 7), (2, 2)),)),
    Case("5x7-winograd", 3, 5, 7, (ModelShape((16,), (5,), (1,)),)),
    Case("5x7-two-layers", 3, 5, 7, (ModelShape((3, 7), (5, 3), (1, 2)),)),
    Case("5x7-kernel-7", 2, 5, 7, (ModelShape((17, 1), (7, 7), (2, 1)),)),
    Case("5x7-kernel-1", 2, 5, 7, (ModelShape((7, 16, 3), (1, 1, 1), (2, 1, 2)),)),
    Case("8x8-kernel-1-stride-2", 2, 8, 8, (ModelShape((3, 5, 4), (1, 1, 1), (2, 2, 1)),)),
    Case("17x13-three-layers", 2, 17, 13, (ModelShape((16, 17, 3), (5, 5, 5), (1, 2, 2)),)),
    Case("17x13-all-kernels", 2, 17, 13, (ModelShape((7, 16, 1, 3), (7, 1, 3, 5), (2, 1, 2, 1)),)),
    Case("17x13-wide", 1, 17, 13, (ModelShape((77, 48), (5, 5), (1, 2)),)),
    Case("17x13-mixed", 3, 17, 13, _MIXED),
    Case("28x28-published", 2, 28, 28, (published(48, 49, 3, 7, 3),)),
    Case("28x28-wide", 1, 28, 28, (published(49, 77, 17, 16, 7),)),
    Case("28x28-mixed", 2, 28, 28, _MIXED),
)

LARGE_CASES: tuple[Case, ...] = (
    Case("112x112-published", 2, 112, 112, (published(47, 57, 3, 7, 3), published(16, 77, 3, 3, 1))),
    Case("112x112-kernel-7", 1, 112, 112, (ModelShape((17, 5, 3), (7, 3, 7), (2, 1, 2)),)),
)

PAIRED_CASES: tuple[Case, ...] = (
    Case("17x13-pairs", 9, 17, 13, _MIXED),
    Case("28x28-pairs", 4, 28, 28, (published(48, 49, 3, 7, 3), published(17, 20, 3, 5, 3))),
)

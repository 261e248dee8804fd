"""Reader of shared compact models: an .npz pack `<family>/filters<F>/<tensor>`.

Source: github.com/cowleygroup/V4_compact_models (data_shared_compact_models), converted to one archive.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from cortexloop.io._archive import Archive
from cortexloop.io.assemble import (
    PUBLISHED_SIZE,
    PUBLISHED_STRIDES,
    depth_of,
    drop_axes,
    float_tensor,
    layers_from_tensors,
)
from cortexloop.io.paths import existing_file, naming, pick
from cortexloop.io.published import read_tensors
from cortexloop.weights import BATCH_NORM_EPSILON, SharedCompactWeights

_POOL = "/spatial_pool/depthwise_kernel.npy"


def load_shared(
    source: str | os.PathLike[str],
    *,
    names: Sequence[str] | None = None,
    strides: Sequence[int] | None = None,
    input_size: tuple[int, int] = PUBLISHED_SIZE,
) -> list[SharedCompactWeights]:
    """Shared compact models of an .npz pack, named `<family>/filters<F>`, as in `from_ensemble_model/filters35`.

    A family whose name begins with `linear_` has no ReLU: the arrays alone do not tell.

    Args:
        source: the .npz file.
        names: the models wanted, in this order; None for all, in the order of the file.
        strides: stride of each layer; None for the published 1, 2, 2, 1, 1.
        input_size: height and width of the images.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds no shared models, or lacks one of `names`.
    """
    path = existing_file(source)
    with naming(path):
        archive = Archive(path)
        try:
            found = [name.removesuffix(_POOL) for name in archive.names if name.endswith(_POOL)]
            if not found:
                raise ValueError("it holds no shared compact model")
            wanted = pick(found, names)
            return [_read(archive, name, strides, input_size) for name in wanted]
        finally:
            archive.close()


def _read(
    archive: Archive, name: str, strides: Sequence[int] | None, input_size: tuple[int, int]
) -> SharedCompactWeights:
    members = [member for member in archive.names if member.startswith(f"{name}/")]
    tensors = read_tensors(archive, name, members)
    depth = depth_of(tensors)
    strides = PUBLISHED_STRIDES if strides is None else tuple(strides)
    if len(strides) != depth:
        raise ValueError(f"model {name!r} has {depth} layers; give a stride for each, got {strides}")
    return SharedCompactWeights(
        name=name,
        layers=layers_from_tensors(tensors, strides, (BATCH_NORM_EPSILON,) * depth),
        mixing=drop_axes(tensors, "mixing/kernel", (0, 1)),
        mixing_bias=float_tensor(tensors, "mixing/bias"),
        spatial=drop_axes(tensors, "spatial_pool/depthwise_kernel", (3,)),
        spatial_bias=float_tensor(tensors, "spatial_pool/bias"),
        relu=not name.startswith("linear_"),
        height=input_size[0],
        width=input_size[1],
    ).validate()

"""Which launches a call of the Triton kernels needs: computed once per packed table. Imports no Triton."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cortexloop import _device
from cortexloop.backends.triton.layout import Field, Head, float16_scales, lay_out, unsupported_table
from cortexloop.packing import LANES, LayerField, ModelField, layer_fields, padded

WORKSPACE = 2**28
"""Numbers that the maps of one round of launches may take: 1 GiB in float32, half of it in float16.

A call of more units (image, model) runs in rounds; a single unit that is larger takes what it needs. Each round costs
some ten launches, which a round of hundreds of units hides.
"""

Variant = tuple[tuple[str, int], ...]  # what is compiled into a kernel, by name


def launch_config(kernel: str, *, fast: bool = False) -> dict[str, int | bool]:
    """Block sizes and compiler options of a kernel: tiles of TILE_H x TILE_W pixels, BLOCK numbers per step.

    In the layers BLOCK is 16: the smallest depth of a product, and a divisor of every padded channel count. One stage:
    more would stage the loads of all 25 taps through shared memory, 220 KB per program.
    """
    common = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    layer = {"TILE_H": 8, "TILE_W": 8, "BLOCK": LANES}
    blocks = {
        "recentre": {"BLOCK": 1024, "DEPTH": 4 if fast else 3},
        "first_layer": {**layer, "TILE_W": 16, "DEPTH": 3},
        "separable_layer": layer,
        "readout": {"BLOCK": 1024},
        "layer_gradient": layer,
        "image_gradient": {"BLOCK": 256},
    }
    if fast:
        blocks["first_layer"] |= {"DEPTH": 4, "BLOCK": 32, "num_warps": 8}
    return {**common, **blocks[kernel]}


def blocking(columns: int) -> tuple[int, int]:
    """(MAIN, REST): how a program covers `columns`, a multiple of 16, by powers of two.

    One block of MAIN and, if REST > 0, one of REST: 48 = 32 + 16 and 80 = 64 + 16 waste nothing. Above 160, and where
    the two would not be enough, several programs of MAIN = 128 share the columns.
    """
    main = 1 << (columns.bit_length() - 1)
    rest = columns - main
    if rest:
        rest = 1 << (rest - 1).bit_length()
    if rest == main:
        main, rest = 2 * main, 0
    return (main, rest) if main <= 128 and main + rest <= 160 else (128, 0)


@dataclass(frozen=True)
class Launch:
    """One launch: the models it serves and what is compiled in.

    members: int32 on the device: the models of a group, `count` of them, or (pairs) a mark for each model of the bank.
    tiles: of the model that has most.
    """

    layer: int
    variant: Variant
    members: Tensor
    count: int
    tiles: int


@dataclass(frozen=True)
class Group:
    """Models that run together: `stride` numbers of maps per image, those of the first model at `origin`."""

    origin: int
    stride: int
    forward: tuple[Launch, ...]
    readout: Launch
    backward: tuple[Launch, ...]
    images: tuple[Launch, ...]


@dataclass(frozen=True)
class Border:
    """Where an image lies within zeros, enough for the first layer of every model: [rows, columns, 3]."""

    top: int
    left: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Program:
    """What one kind of call launches. table: int64 [N, layers, Field]; heads: int64 [N, Head]; both on the device."""

    table: Tensor
    heads: Tensor
    groups: tuple[Group, ...]
    images_per_round: int


class BankPlan:
    """Layout and launches for one packed table.

    Raises:
        ValueError: the kernels do not take this table; the message ends in the sentence of `unsupported_table`.
    """

    def __init__(self, table: Tensor) -> None:
        self.rows = table.detach().cpu().numpy()
        reason = unsupported_table(self.rows)
        if reason is not None:
            raise ValueError(f"the Triton kernels cannot run this bank: {reason}")
        self.device = table.device
        self.models = len(self.rows)
        self.layers = int(self.rows[:, ModelField.DEPTH].max())
        self.height, self.width = int(self.rows[0, ModelField.HEIGHT]), int(self.rows[0, ModelField.WIDTH])
        self.border = self._border()
        self.extent = lay_out(self.rows, gradient=False)[3]
        self._lock = threading.Lock()
        self._programs: dict[tuple[bool, bool], Program] = {}
        self._scales: MutableMapping[Tensor, tuple[int, Tensor]] = WeakTensorKeyDictionary()
        self._seen: set[Hashable] = set()

    def _border(self) -> Border:
        ends = {"top": 0, "left": 0, "rows": 0, "columns": 0}
        for row in self.rows:
            f = layer_fields(row, 0)
            k, stride = f[LayerField.KERNEL_SIZE], f[LayerField.STRIDE]
            for before, size, out, pad in (
                ("top", "rows", LayerField.OUT_HEIGHT, LayerField.PAD_TOP),
                ("left", "columns", LayerField.OUT_WIDTH, LayerField.PAD_LEFT),
            ):
                ends[before] = max(ends[before], f[pad])
                ends[size] = max(ends[size], (f[out] - 1) * stride + k - f[pad])
        rows = ends["top"] + max(ends["rows"], self.height)
        return Border(ends["top"], ends["left"], rows, ends["left"] + max(ends["columns"], self.width))

    def prepare(self, options: Hashable, *tensors: Tensor | None) -> None:
        """Note a kind of call. The first of its kind compiles kernels, which no graph can hold.

        Raises:
            RuntimeError: a graph is being captured, and there was no such call before.
        """
        # Triton compiles again for addresses that are no multiple of 16.
        kinds = tuple(None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors)
        with self._lock:
            if (options, kinds) not in self._seen:
                _device.refuse_capture(self.device)
                self._seen.add((options, kinds))

    def program(self, *, gradient: bool, paired: bool) -> Program:
        """What a forward or a gradient, of full products or of pairs, launches."""
        with self._lock:
            key = gradient, paired
            if key not in self._programs:
                self._programs[key] = _Builder(self, gradient, paired).program()
            return self._programs[key]

    def scales(self, weights: Tensor) -> Tensor:
        """float32 [N, layers, Scale] for these weights; see `layout.Scale`."""
        version = 0 if weights.is_inference() else weights._version
        with self._lock:
            known = self._scales.get(weights)
            if known is None or known[0] != version:
                _device.refuse_capture(self.device)
                layers = lay_out(self.rows, gradient=False)[0]
                scales = float16_scales(self.rows, layers, weights.detach().cpu().numpy())
                known = version, torch.from_numpy(scales).to(self.device)
                self._scales[weights] = known
            return known[1]


class _Builder:
    """Sorts a bank's models into groups that fit the workspace, and each group's layers into launches."""

    def __init__(self, plan: BankPlan, gradient: bool, paired: bool) -> None:
        self.plan, self.gradient, self.paired = plan, gradient, paired
        self.layers, self.heads, self.sizes, _ = lay_out(plan.rows, gradient=gradient)

    def program(self) -> Program:
        if self.paired:
            groups = [self._group(list(range(self.plan.models)), max(self.sizes))]
        else:
            groups = [self._group(models, sum(self.sizes[n] for n in models)) for models in self._partition()]
        border = self.plan.border
        per_image = max(group.stride for group in groups) + border.rows * border.columns * 4
        return Program(
            table=self._upload(self.layers),
            heads=self._upload(self.heads),
            groups=tuple(groups),
            images_per_round=max(1, WORKSPACE // per_image),
        )

    def _upload(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.plan.device)

    def _partition(self) -> list[list[int]]:
        """Neighbouring models whose maps for one image fit the workspace. It depends on the bank alone, and so does the
        order in which gradients are summed."""
        groups: list[list[int]] = []
        room = 0
        for n, size in enumerate(self.sizes):
            if not groups or size > room:
                groups.append([])
                room = WORKSPACE
            groups[-1].append(n)
            room -= size
        return groups

    def _group(self, models: list[int], stride: int) -> Group:
        forward: list[Launch] = []
        backward: list[Launch] = []
        for layer in range(self.plan.layers):
            deep = [n for n in models if self.plan.rows[n, ModelField.DEPTH] > layer]
            forward += self._launches(layer, deep, self._forward_variant)
            if self.gradient:
                backward = self._launches(layer, deep, self._gradient_variant) + backward
        return Group(
            origin=int(self.heads[models[0], Head.UNIT]),
            stride=stride,
            forward=tuple(forward),
            readout=self._launches(0, models, lambda n, layer: ((), 1))[0],
            backward=tuple(backward),
            images=tuple(self._launches(0, models, lambda n, layer: (self._kernel(n, 0), 1))) if self.gradient else (),
        )

    def _launches(
        self, layer: int, models: Sequence[int], variant: Callable[[int, int], tuple[Variant, int]]
    ) -> list[Launch]:
        """One launch for each variant among the models, in the order in which they first come."""
        kinds: dict[Variant, tuple[list[int], int]] = {}
        for n in models:
            key, tiles = variant(n, layer)
            members, most = kinds.get(key, ([], 0))
            kinds[key] = [*members, n], max(most, tiles)
        launches = []
        for key, (members, tiles) in kinds.items():
            if self.paired:
                marks = np.zeros(self.plan.models, dtype=np.int32)
                marks[members] = 1
                launches.append(Launch(layer, key, self._upload(marks), 1, tiles))
            else:
                listed = np.array(members, dtype=np.int32)
                launches.append(Launch(layer, key, self._upload(listed), len(members), tiles))
        return launches

    def _kernel(self, n: int, layer: int) -> Variant:
        f = layer_fields(self.plan.rows[n], layer)
        return (("K", f[LayerField.KERNEL_SIZE]), ("STRIDE", f[LayerField.STRIDE]))

    def _tiles(self, kernel: str, n: int, layer: int, stride: int, columns: int) -> tuple[Variant, int]:
        """(MAIN and REST, programs per unit) where a program takes a tile of pixels `stride` apart."""
        config, f = launch_config(kernel), self.layers[n, layer]
        main, rest = blocking(columns)
        down = -(-int(f[Field.OUT_HEIGHT]) // (stride * config["TILE_H"]))
        across = -(-int(f[Field.OUT_WIDTH]) // (stride * config["TILE_W"]))
        blocks = 1 if rest else -(-columns // main)
        return (("MAIN", main), ("REST", rest)), down * across * blocks * stride * stride

    def _forward_variant(self, n: int, layer: int) -> tuple[Variant, int]:
        kernel = "separable_layer" if layer else "first_layer"
        columns, tiles = self._tiles(kernel, n, layer, 1, int(self.layers[n, layer, Field.OUT_PADDED]))
        return self._kernel(n, layer) + columns, tiles

    def _gradient_variant(self, n: int, layer: int) -> tuple[Variant, int]:
        last = layer + 1 == self.plan.rows[n, ModelField.DEPTH]
        above: Variant = (("K", 1), ("STRIDE", 1)) if last else self._kernel(n, layer + 1)
        taps = 0 if layer else 3 * dict(self._kernel(n, 0))["K"] ** 2
        inputs = padded(taps) if taps else int(self.layers[n, layer, Field.IN_PADDED])
        columns, tiles = self._tiles("layer_gradient", n, layer, dict(above)["STRIDE"], inputs)
        return (*above, ("LAST", int(last)), ("TAPS", taps), *columns), tiles


_plans: MutableMapping[Tensor, BankPlan] = WeakTensorKeyDictionary()
_plans_lock = threading.Lock()


def plan_of(table: Tensor) -> BankPlan:
    """The plan of a packed table, computed when first asked for; tables are never written.

    Raises:
        ValueError: the kernels do not take this table.
    """
    with _plans_lock:
        known = _plans.get(table)
        if known is None:
            known = _plans[table] = BankPlan(table)
        return known

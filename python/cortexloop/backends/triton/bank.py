"""Model bank on a GPU by Triton: allocate, cut the batch into rounds, launch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from cortexloop import _device
from cortexloop.backends.triton import bank_bwd, bank_fwd
from cortexloop.backends.triton.launch import launch as _launch
from cortexloop.backends.triton.plan import Group, Launch, launch_config, plan_of

INTERPRETED = not isinstance(bank_fwd._readout_kernel, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1 when they were imported)."""


class _Call:
    """The tensors of one call; its rounds use the same memory in turn.

    Raises:
        ValueError: the kernels do not take the table, or the weights are not of the same bank.
        RuntimeError: a graph is being captured, and this kind of call has not been prepared.
        torch.OutOfMemoryError: no room on the device.
    """

    def __init__(
        self,
        images: Tensor,
        weights: Tensor,
        table: Tensor,
        pairs: Tensor | None,
        layout: str,
        *,
        fast: bool = False,
        cotangent: Tensor | None = None,
    ) -> None:
        plan, device = plan_of(table), images.device
        if plan.extent > weights.numel():
            raise ValueError(
                f"weights hold {weights.numel()} numbers, the table refers to {plan.extent}: "
                "they do not belong to one bank"
            )
        plan.prepare((fast, layout), images, weights, pairs, cotangent)
        self.plan, self.program = plan, plan.program(gradient=cotangent is not None, paired=pairs is not None)
        self.images, self.weights, self.pairs, self.cotangent = images, weights, pairs, cotangent
        self.planar, self.fast = layout == "NCHW", fast
        self.scales = plan.scales(weights) if fast else weights  # exact kernels do not follow it
        batch, depth = images.shape[0], launch_config("recentre", fast=fast)["DEPTH"]
        n, dtype = min(batch, self.program.images_per_round), torch.float16 if fast else torch.float32
        border = plan.border.rows * plan.border.columns * depth
        stride = max(group.stride for group in self.program.groups)
        units = f"{batch} images with {plan.models} models" if pairs is None else f"{batch} pairs"
        size = n * (border + stride) * dtype.itemsize / 2**20
        with _device.memory(device, f"{units}: {size:.0f} MiB of maps, and the results"):
            self.responses = torch.empty((batch, plan.models) if pairs is None else (batch,), device=device)
            self.recentred = torch.empty((n, border), dtype=dtype, device=device)
            self.maps = torch.empty(n * stride, dtype=dtype, device=device)
            if cotangent is not None:
                self.grad = torch.empty(images.shape, device=device)

    def rounds(self) -> Iterator[tuple[int, int]]:
        """(first image, number of images) of each round."""
        batch, step = self.images.shape[0], self.program.images_per_round
        for first in range(0, batch, step):
            yield first, min(step, batch - first)

    def recentre(self, first: int, images: int) -> None:
        """Recentred images of the round, with zeros around them."""
        border, config = self.plan.border, launch_config("recentre", fast=self.fast)
        blocks = -(-self.recentred.shape[1] // config["BLOCK"])
        _launch(
            bank_fwd._recentre_kernel,
            images * blocks,
            *(self.images, self.weights, self.recentred, first, self.plan.height, self.plan.width),
            *(border.top, border.left, border.rows, border.columns, blocks),
            PIXELS=self.images.dtype == torch.uint8,
            PLANAR=self.planar,
            **config,
        )

    def _units(self, group: Group, launch: Launch, first: int, tiles: int) -> tuple[object, ...]:
        """The arguments with which every kernel on units begins; see `units.py`."""
        program = self.program
        pairs = program.heads if self.pairs is None else self.pairs  # without pairs it is not followed
        return (
            *(self.maps, self.weights, program.table, program.heads, self.scales, launch.members, pairs),
            *(first, launch.count, tiles, self.plan.layers, self.plan.models, launch.layer),
            *(group.stride, group.origin),
        )

    def forward(self, group: Group, first: int, images: int) -> None:
        """All maps of a group for the images of a round, and the responses."""
        paired, border = self.pairs is not None, self.plan.border
        for launch in group.forward:
            units = self._units(group, launch, first, launch.tiles)
            programs = images * launch.count * launch.tiles
            compiled = {**dict(launch.variant), "FAST": self.fast, "PAIRED": paired}
            if launch.layer == 0:
                place = (border.top, border.left, border.rows, border.columns)
                kernel, config = bank_fwd._first_layer_kernel, launch_config("first_layer", fast=self.fast)
                _launch(kernel, programs, *units, self.recentred, *place, **compiled, **config)
            else:
                _launch(
                    bank_fwd._separable_layer_kernel,
                    programs,
                    *units,
                    **compiled,
                    **launch_config("separable_layer", fast=self.fast),
                )
        _launch(
            bank_fwd._readout_kernel,
            images * group.readout.count,
            *self._units(group, group.readout, first, 1),
            self.responses,
            FAST=self.fast,
            PAIRED=paired,
            **launch_config("readout", fast=self.fast),
        )

    def backward(self, group: Group, first: int, images: int, *, add: bool) -> None:
        """Gradients of a group for the images of a round, from the maps of `forward`; `add`: to what `grad` holds."""
        paired = self.pairs is not None
        for launch in group.backward:
            _launch(
                bank_bwd._layer_gradient_kernel,
                images * launch.count * launch.tiles,
                *self._units(group, launch, first, launch.tiles),
                self.cotangent,
                PAIRED=paired,
                **dict(launch.variant),
                **launch_config("layer_gradient"),
            )
        config = launch_config("image_gradient")
        blocks = -(-self.plan.height * self.plan.width * 3 // config["BLOCK"])
        for position, launch in enumerate(group.images):
            _launch(
                bank_bwd._image_gradient_kernel,
                images * blocks,
                *self._units(group, launch, first, blocks),
                *(self.cotangent, self.grad, self.plan.height, self.plan.width),
                ADD=not paired and (add or position > 0),
                PAIRED=paired,
                PLANAR=self.planar,
                **dict(launch.variant),
                **config,
            )


class BankOperators:
    """Kernels for uint8 and float32 images in GPU memory."""

    def bank_forward(
        self, images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, layout: str, precision: str
    ) -> Tensor:
        with _device.selected(images.device):
            call = _Call(images, weights, table, pairs, layout, fast=precision == "fast")
            for first, n in call.rounds():
                call.recentre(first, n)
                for group in call.program.groups:
                    call.forward(group, first, n)
        return call.responses

    def bank_input_gradient(
        self, images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, cotangent: Tensor, layout: str
    ) -> tuple[Tensor, Tensor]:
        with _device.selected(images.device):
            call = _Call(images, weights, table, pairs, layout, cotangent=cotangent)
            for first, n in call.rounds():
                call.recentre(first, n)
                for position, group in enumerate(call.program.groups):
                    call.forward(group, first, n)
                    call.backward(group, first, n, add=position > 0)
        return call.grad, call.responses

"""Model bank in plain torch: unpacks the sections that `cortexloop.packing` wrote and runs one convolution at a time.

    z_l = bias + pointwise * depthwise * a_(l-1)   (first layer: one full convolution),   a_l = max(0, z_l)
    response = readout_bias + sum_hwk readout[h, w, k] a_L[h, w, k]

The gradient is written out, not recorded: an operator's implementation runs below autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cortexloop.packing import LayerField, ModelField, layer_fields, padded
from cortexloop.weights import same_padding

Padding = tuple[int, int, int, int]  # left, right, top, bottom, as F.pad takes it


@dataclass(frozen=True)
class Layer:
    """One layer, batch norm folded."""

    stride: int
    padding: Padding
    spatial: Tensor  # first layer [O, 3, k, k]; others depthwise [C, 1, k, k]
    pointwise: Tensor | None  # [O, C, 1, 1]; None in the first layer
    bias: Tensor  # [O]

    def pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self.padding)

    @property
    def groups(self) -> int:
        return 1 if self.pointwise is None else self.spatial.shape[0]

    def convolve(self, x: Tensor) -> Tensor:
        """The spatial convolution alone: full in the first layer, depthwise in the others. x: [B, C, H, W]."""
        return F.conv2d(self.pad(x), self.spatial, stride=self.stride, groups=self.groups)

    def forward(self, x: Tensor) -> Tensor:
        """The post-ReLU map, [B, O, h, w]."""
        y = self.convolve(x)
        if self.pointwise is not None:
            y = F.conv2d(y, self.pointwise)
        return F.relu(y + self.bias[:, None, None])

    def backward(self, grad: Tensor, output: Tensor, height: int, width: int) -> Tensor:
        """Gradient of the input [B, C, height, width] from that of the post-ReLU output; the ReLU's is 0 at 0."""
        grad = torch.where(output > 0, grad, 0)
        if self.pointwise is not None:
            grad = torch.einsum("bohw,oc->bchw", grad, self.pointwise[:, :, 0, 0])
        left, right, top, bottom = self.padding
        k = self.spatial.shape[2]
        # Rows and columns behind the last stride, which the convolution never read (k = 1, stride 2, even size).
        unread_h = height + top + bottom - ((grad.shape[2] - 1) * self.stride + k)
        unread_w = width + left + right - ((grad.shape[3] - 1) * self.stride + k)
        full = F.conv_transpose2d(
            grad, self.spatial, stride=self.stride, output_padding=(unread_h, unread_w), groups=self.groups
        )
        return full[:, :, top : top + height, left : left + width]


@dataclass(frozen=True)
class Model:
    """One unpacked model."""

    layers: tuple[Layer, ...]
    readout: Tensor  # [C, h, w]
    readout_bias: Tensor  # []

    def maps(self, x: Tensor) -> list[Tensor]:
        """x: recentred images [B, 3, H, W]. Returns the input and every post-ReLU map."""
        maps = [x]
        for layer in self.layers:
            maps.append(layer.forward(maps[-1]))
        return maps

    def read(self, last: Tensor) -> Tensor:
        """Responses [B] from the last map."""
        return (last * self.readout).sum(dim=(1, 2, 3)) + self.readout_bias

    def backward(self, cotangent: Tensor, maps: list[Tensor]) -> Tensor:
        """Gradient of the recentred images [B, 3, H, W]; cotangent: [B]."""
        grad = cotangent[:, None, None, None] * self.readout
        for layer, x, output in zip(reversed(self.layers), reversed(maps[:-1]), reversed(maps[1:]), strict=True):
            grad = layer.backward(grad, output, x.shape[2], x.shape[3])
        return grad


def unpack(weights: Tensor, row: list[int], dtype: torch.dtype) -> Model:
    """Read one model's sections of the packed buffer; see the layout in `cortexloop.packing`.

    Raises:
        ValueError: a section lies outside the buffer (weights and table are not of one bank).
    """

    def section(offset: int, *shape: int) -> Tensor:
        size = 1
        for n in shape:
            size *= n
        if offset < 0 or offset + size > weights.numel():
            raise ValueError(
                f"weights hold {weights.numel()} numbers, the table refers to {offset}..{offset + size}: "
                "they do not belong to one bank"
            )
        return weights[offset : offset + size].view(shape).to(dtype)

    f = LayerField
    layers = []
    height, width = row[ModelField.HEIGHT], row[ModelField.WIDTH]
    channels = 3
    for index in range(row[ModelField.DEPTH]):
        fields = layer_fields(row, index)
        k, stride, o = fields[f.KERNEL_SIZE], fields[f.STRIDE], fields[f.OUT_CHANNELS]
        out_h, top, bottom = same_padding(height, k, stride)
        out_w, left, right = same_padding(width, k, stride)
        if index == 0:
            spatial = section(fields[f.SPATIAL], k, k, 3, padded(o))[..., :o].permute(3, 2, 0, 1)
            pointwise = None
        else:
            spatial = section(fields[f.SPATIAL], k, k, padded(channels))[..., :channels].permute(2, 0, 1)[:, None]
            mixing = section(fields[f.POINTWISE], channels, padded(o))[:, :o]
            pointwise = mixing.T[:, :, None, None].contiguous()
        bias = section(fields[f.BIAS], padded(o))[:o]
        layers.append(Layer(stride, (left, right, top, bottom), spatial.contiguous(), pointwise, bias))
        height, width, channels = out_h, out_w, o
    readout = section(row[ModelField.READOUT], height, width, padded(channels))[..., :channels]
    return Model(tuple(layers), readout.permute(2, 0, 1), section(row[ModelField.READOUT_BIAS], 1)[0])


def math_dtype(images: Tensor) -> torch.dtype:
    # cuDNN convolutions round float32 inputs to TF32 by default; float64 keeps the reference exact without touching
    # the process-wide switch.
    return torch.float64 if images.dtype == torch.float64 or images.device.type == "cuda" else torch.float32


def _result_dtype(images: Tensor) -> torch.dtype:
    return torch.float64 if images.dtype == torch.float64 else torch.float32


def recentred(images: Tensor, weights: Tensor, layout: str) -> Tensor:
    """[B, 3, H, W] in the dtype of the computation; uint8 images minus the mean, rounded once to float32."""
    x = images.permute(0, 3, 1, 2) if layout == "NHWC" else images
    if images.dtype == torch.uint8:
        x = (x.double() - weights[:3].double()[:, None, None]).float()
    return x.to(math_dtype(images)).contiguous()  # torch sums in another order where channels lie last


def _chunks(images: Tensor) -> list[slice]:
    """One image at a time on the CPU: memory stays bounded and no result depends on the batch. Elsewhere 32."""
    step = 1 if images.device.type == "cpu" else 32
    return [slice(i, i + step) for i in range(0, images.shape[0], step)]


def _rows_of(model: int, pairs: Tensor | None, images: Tensor) -> Tensor | slice:
    """The images that `model` is to see."""
    return slice(None) if pairs is None else torch.nonzero(pairs == model)[:, 0]


class BankOperators:
    """One convolution at a time; images of any device, uint8, float32 or float64."""

    def bank_forward(
        self, images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, layout: str, precision: str
    ) -> Tensor:
        shape = (images.shape[0], table.shape[0]) if pairs is None else (images.shape[0],)
        out = images.new_empty(shape, dtype=_result_dtype(images))
        for n, row in enumerate(table.tolist()):
            rows = _rows_of(n, pairs, images)
            chosen = images[rows]
            if len(chosen) == 0:
                continue
            model = unpack(weights, row, math_dtype(images))
            parts = [model.read(model.maps(recentred(chosen[c], weights, layout))[-1]) for c in _chunks(chosen)]
            values = torch.cat(parts).to(out.dtype)
            if pairs is None:
                out[:, n] = values
            else:
                out[rows] = values
        return out

    def bank_input_gradient(
        self, images: Tensor, weights: Tensor, table: Tensor, pairs: Tensor | None, cotangent: Tensor, layout: str
    ) -> tuple[Tensor, Tensor]:
        math = math_dtype(images)
        grad = torch.zeros(images.shape, dtype=math, device=images.device)
        target = grad.permute(0, 3, 1, 2) if layout == "NHWC" else grad  # [B, 3, H, W]
        responses = torch.empty(cotangent.shape, dtype=_result_dtype(images), device=images.device)
        for n, row in enumerate(table.tolist()):
            model = unpack(weights, row, math)
            rows = _rows_of(n, pairs, images)
            positions = torch.arange(images.shape[0], device=images.device)[rows]
            for chunk in _chunks(positions):
                here = positions[chunk]
                maps = model.maps(recentred(images[here], weights, layout))
                index = (here, torch.full_like(here, n)) if pairs is None else (here,)
                responses[index] = model.read(maps[-1]).to(responses.dtype)
                weight = cotangent[index].to(math)
                if torch.any(weight != 0):  # a model that is not asked for adds nothing, not even 0 * inf
                    target[here] += model.backward(weight, maps)
        return grad.to(_result_dtype(images)), responses

    def bank_activations(
        self, images: Tensor, weights: Tensor, row: list[int], layer: int, kind: str, layout: str
    ) -> Tensor:
        """One model's map [B, h, w, C]: "activity" = post-ReLU of `layer`, "depthwise" = what feeds its pointwise."""
        model = unpack(weights, row, math_dtype(images))
        parts = []
        for chunk in _chunks(images):
            x = recentred(images[chunk], weights, layout)
            for before in model.layers[:layer]:
                x = before.forward(x)
            last = model.layers[layer]
            y = last.forward(x) if kind == "activity" else last.convolve(x)
            parts.append(y.permute(0, 2, 3, 1).to(_result_dtype(images)))
        if parts:
            return torch.cat(parts).contiguous()
        fields = layer_fields(row, layer)
        channels = fields[LayerField.OUT_CHANNELS if kind == "activity" else LayerField.IN_CHANNELS]
        shape = (0, fields[LayerField.OUT_HEIGHT], fields[LayerField.OUT_WIDTH], channels)
        return images.new_empty(shape, dtype=_result_dtype(images))

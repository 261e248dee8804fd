"""The compact model of one V4 neuron, written to be read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cortexloop.models.layers import Trunk, copy_into, glorot_uniform_, to_numpy, torch_dtype
from cortexloop.weights import BATCH_NORM_EPSILON, IMAGE_MEAN, CompactWeights


class CompactModel(nn.Module):
    """A compact model of one neuron: recentred images [B, H, W, 3] -> responses [B].

    A full convolution, then separable (depthwise and 1 x 1) convolutions, each with TensorFlow "same" zero padding and
    followed by batch normalisation and ReLU; then a linear readout of the last map. Images are RGB 0..255 minus
    `image_mean` (about -116..155), row 0 at the top. Responses are about z-scored, with arbitrary offset and scale.

    A new model has Keras' default initialisation (Glorot uniform kernels, zero biases), batch-norm momentum 0.99 in
    Keras' sense, and float32 parameters; `.double()`, `.to(...)`, `.train()` and `.eval()` work as on any module.
    `from_weights` gives a model in evaluation mode.

    Source: Cowley, Stan, Pillow & Smith, "Compact deep neural network models of visual cortex".

    Args:
        filters: filters of each layer, [K0, K1, ...]; any depth from 1.
        kernel_sizes: side of each layer's kernel, one of 1, 3, 5, 7; one number serves all layers.
        strides: stride of each layer, 1 or 2; None stands for the published 1, 2, 2, 1, 1 and needs five layers.
        height, width: size of the images, in pixels.
        epsilons: batch-norm epsilon, one number or one for each layer.
        image_mean: the RGB mean that was subtracted from the images; carried along, not applied.
        generator: source of the random initial parameters; None uses torch's global one.

    Raises:
        ValueError: an argument is outside of what is listed above.
    """

    def __init__(
        self,
        filters: Sequence[int],
        kernel_sizes: Sequence[int] | int = 5,
        strides: Sequence[int] | None = None,
        height: int = 112,
        width: int = 112,
        *,
        epsilons: Sequence[float] | float = BATCH_NORM_EPSILON,
        image_mean: Sequence[float] = IMAGE_MEAN,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        strides = published_strides(len(filters)) if strides is None else strides
        self.trunk = Trunk(filters, kernel_sizes, strides, epsilons, height, width, image_mean)
        self.trunk.initialize(generator)
        h, w = self.trunk.map_size
        self.readout = nn.Parameter(torch.empty(h, w, self.trunk.channels))
        self.readout_bias = nn.Parameter(torch.zeros(()))
        glorot_uniform_(self.readout, self.readout.numel(), 1, generator)

    @classmethod
    def from_weights(cls, weights: CompactWeights) -> CompactModel:
        """The model with these parameters, in their dtype (the wider one) and in evaluation mode.

        Raises:
            ValueError: the weights are not valid.
        """
        weights.validate()
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        dtype = torch_dtype(weights)
        model.trunk = Trunk.like(weights, dtype)
        model.readout = nn.Parameter(torch.empty(weights.readout.shape, dtype=dtype))
        copy_into(model.readout, weights.readout)
        model.readout_bias = nn.Parameter(torch.tensor(weights.readout_bias, dtype=dtype))
        return model.eval()

    def to_weights(self, name: str) -> CompactWeights:
        """The parameters as a named set of NumPy arrays, bit for bit (float32 and float64).

        Raises:
            ValueError: a parameter is not finite.
        """
        return CompactWeights(
            name=name,
            layers=tuple(layer.to_weights() for layer in self.trunk.stack()),
            readout=to_numpy(self.readout),
            readout_bias=float(self.readout_bias.detach()),
            height=self.trunk.height,
            width=self.trunk.width,
            image_mean=self.trunk.image_mean,
        ).validate()

    def forward(self, images: Tensor) -> Tensor:
        """Responses [B] to recentred images [B, H, W, 3] in the dtype of the parameters.

        Raises:
            ValueError: the images have another size.
            TypeError: the images have another dtype.
        """
        return torch.einsum("bchw,hwc->b", self.trunk(images), self.readout) + self.readout_bias

    def activity(self, images: Tensor, layer: int) -> Tensor:
        """Map of one layer after its ReLU: [B, h, w, C]. Layers count from 0; ValueError for one that is not there."""
        return self.trunk.activity(images, layer)

    def depthwise_output(self, images: Tensor, layer: int) -> Tensor:
        """Output of one layer's depthwise convolution, before bias and pointwise convolution: [B, h, w, C_in].

        Raises:
            ValueError: `layer` is 0, which has no depthwise convolution, or is not there.
        """
        return self.trunk.depthwise_output(images, layer)


def published_strides(depth: int) -> tuple[int, ...]:
    """The strides of the published models; ValueError for a depth other than their five."""
    strides = (1, 2, 2, 1, 1)
    if depth != len(strides):
        raise ValueError(f"strides must be given for a model of {depth} layers: only five layers have a default")
    return strides

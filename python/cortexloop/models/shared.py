"""The shared compact model: one trunk, many neurons, a factorised readout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cortexloop.models.compact import published_strides
from cortexloop.models.layers import Trunk, copy_into, glorot_uniform_, to_numpy, torch_dtype
from cortexloop.weights import BATCH_NORM_EPSILON, IMAGE_MEAN, SharedCompactWeights


class SharedCompactModel(nn.Module):
    """A shared compact model of N neurons: recentred images [B, H, W, 3] -> responses [B, N].

    The trunk is that of `CompactModel`. The readout mixes the C channels of the last map into one map per neuron
    (1 x 1 convolution with bias), then weighs that map by position and sums (with a second bias); nothing nonlinear
    lies between. Without `relu` the whole model is linear (affine) in the image; batch normalisation stays.

    Args: as of `CompactModel`, and
        neurons: number of responses, N.
        relu: whether a ReLU follows each batch normalisation.

    Raises:
        ValueError: an argument is outside of what is listed.
    """

    def __init__(
        self,
        filters: Sequence[int],
        neurons: int,
        kernel_sizes: Sequence[int] | int = 5,
        strides: Sequence[int] | None = None,
        height: int = 112,
        width: int = 112,
        *,
        relu: bool = True,
        epsilons: Sequence[float] | float = BATCH_NORM_EPSILON,
        image_mean: Sequence[float] = IMAGE_MEAN,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if neurons < 1:
            raise ValueError(f"neurons should be at least 1, got {neurons}")
        strides = published_strides(len(filters)) if strides is None else strides
        self.relu = relu
        self.trunk = Trunk(filters, kernel_sizes, strides, epsilons, height, width, image_mean, relu=relu)
        self.trunk.initialize(generator)
        h, w = self.trunk.map_size
        self.mixing = nn.Parameter(torch.empty(self.trunk.channels, neurons))
        self.mixing_bias = nn.Parameter(torch.zeros(neurons))
        self.spatial = nn.Parameter(torch.empty(h, w, neurons))
        self.spatial_bias = nn.Parameter(torch.zeros(neurons))
        glorot_uniform_(self.mixing, self.trunk.channels, neurons, generator)
        glorot_uniform_(self.spatial, h * w * neurons, h * w, generator)  # Keras' depthwise kernel [h, w, N, 1]

    @classmethod
    def from_weights(cls, weights: SharedCompactWeights) -> SharedCompactModel:
        """The model with these parameters, in their dtype (the wider one) and in evaluation mode.

        Raises:
            ValueError: the weights are not valid.
        """
        weights.validate()
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.relu = weights.relu
        dtype = torch_dtype(weights)
        model.trunk = Trunk.like(weights, dtype, relu=weights.relu)
        for label in ("mixing", "mixing_bias", "spatial", "spatial_bias"):
            array = getattr(weights, label)
            parameter = nn.Parameter(torch.empty(array.shape, dtype=dtype))
            copy_into(parameter, array)
            setattr(model, label, parameter)
        return model.eval()

    def to_weights(self, name: str) -> SharedCompactWeights:
        """The parameters as a named set of NumPy arrays, bit for bit (float32 and float64).

        Raises:
            ValueError: a parameter is not finite.
        """
        return SharedCompactWeights(
            name=name,
            layers=tuple(layer.to_weights() for layer in self.trunk.stack()),
            mixing=to_numpy(self.mixing),
            mixing_bias=to_numpy(self.mixing_bias),
            spatial=to_numpy(self.spatial),
            spatial_bias=to_numpy(self.spatial_bias),
            relu=self.relu,
            height=self.trunk.height,
            width=self.trunk.width,
            image_mean=self.trunk.image_mean,
        ).validate()

    def forward(self, images: Tensor) -> Tensor:
        """Responses [B, N] to recentred images [B, H, W, 3] in the dtype of the parameters.

        Raises:
            ValueError: the images have another size.
            TypeError: the images have another dtype.
        """
        mixed = torch.einsum("bchw,cn->bhwn", self.trunk(images), self.mixing) + self.mixing_bias
        return torch.einsum("bhwn,hwn->bn", mixed, self.spatial) + self.spatial_bias

    def activity(self, images: Tensor, layer: int) -> Tensor:
        """Map of one layer after its ReLU (if any): [B, h, w, C]. ValueError for a layer that is not there."""
        return self.trunk.activity(images, layer)

    def depthwise_output(self, images: Tensor, layer: int) -> Tensor:
        """Output of one layer's depthwise convolution, before bias and pointwise convolution: [B, h, w, C_in].

        Raises:
            ValueError: `layer` is 0, which has no depthwise convolution, or is not there.
        """
        return self.trunk.depthwise_output(images, layer)

"""BigGAN, or any other class-conditional generator that the caller brings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from cortexloop.evolve.generators.base import Generator
from cortexloop.evolve.optimiser import positive, whole

Call = Callable[[Tensor, Tensor, float], Tensor]
"""(noise [b, noise_dim], class vectors [b, class_dim], truncation) -> images [b, 3, height, width] in [-1, 1]."""


class BigGANGenerator(Generator):
    """Codes = noise vector and class vector (the embedding of a class, or anything between classes), concatenated.

    The network is the caller's, for example of pytorch_pretrained_biggan (biggan-deep-256), whose inner generator takes
    the concatenated code:

        network = BigGAN.from_pretrained("biggan-deep-256").eval()
        generator = BigGANGenerator(network.generator)

    image = (x + 1) / 2, clipped to [0, 1].

    Scale of codes: noise 0.6 to 0.7 times standard normal numbers, truncated at 2; entries of class embeddings have a
    standard deviation of about 0.06. So codes are much smaller than those of other generators here, and so are the
    published step sizes (sigma of Cholesky CMA): 0.2 for the whole code, 0.06 for the class vector, 0.3 for the noise
    vector. Start from a code of that kind, not from zeros: `sample` makes one.

    Passes are filled up with the last code to always `batch` codes, so that an image depends on its own code alone.

    Source: Brock, Donahue & Simonyan 2019, "Large scale GAN training for high fidelity natural image synthesis"; the
    code space and step sizes as used by Wang & Ponce.

    Args:
        network: a torch module in evaluation mode, called with (codes [b, noise_dim + class_dim], truncation) unless
            `call` is given.
        height, width: of its images, in pixels.
        noise_dim, class_dim: lengths of the two vectors.
        truncation: handed to the network (0.7 as published).
        noise: [noise_dim] to hold the noise vector fixed; codes are class vectors then.
        class_vector: [class_dim] to hold the class vector fixed; codes are noise vectors then.
        call: how to get images in [-1, 1] from (noise, class vectors, truncation), for networks with another signature.
        label: names the network in `settings`; a checkpoint of an evolution goes on only with the same label.
        batch: codes per pass.

    Raises:
        TypeError, ValueError: numbers out of bounds, fixed vectors of another length, both fixed, or a network in
            training mode.
    """

    name = "biggan"

    def __init__(
        self,
        network: nn.Module,
        *,
        height: int = 256,
        width: int = 256,
        noise_dim: int = 128,
        class_dim: int = 128,
        truncation: float = 0.7,
        noise: ArrayLike | Tensor | None = None,
        class_vector: ArrayLike | Tensor | None = None,
        call: Call | None = None,
        label: str = "",
        batch: int = 8,
    ) -> None:
        self.noise_dim, self.class_dim = (
            whole("noise_dim", noise_dim, 1, 2**20),
            whole("class_dim", class_dim, 1, 2**20),
        )
        self.noise = _fixed("noise", noise, self.noise_dim)
        self.class_vector = _fixed("class_vector", class_vector, self.class_dim)
        if self.noise is not None and self.class_vector is not None:
            raise ValueError("noise and class_vector should not both be fixed: nothing would be left to evolve")
        free = self.noise_dim * (self.noise is None) + self.class_dim * (self.class_vector is None)
        super().__init__(height, width, free)
        if network.training:
            raise ValueError("the network should be in evaluation mode, or images depend on each other; call .eval()")
        self.network, self.truncation = network, positive("truncation", truncation)
        self.label, self.batch = str(label), whole("batch", batch, 1, 4096)
        self._call = self._concatenated if call is None else call

    def sample(self, count: int, seed: int = 0, *, class_spread: float = 0.06) -> Tensor:
        """Random codes of the usual scale: float32 [count, dim], on the CPU.

        Noise is normal, truncated at 2, times `truncation`; class vectors are normal with standard deviation
        `class_spread`. The embeddings of trained classes are better class vectors to start from.

        Raises:
            TypeError, ValueError: numbers out of bounds.
        """
        whole("count", count, 0, 2**20)
        spread = positive("class_spread", class_spread, zero=True)
        random = torch.Generator().manual_seed(whole("seed", seed, 0, 2**63 - 1))
        noise = torch.empty(count, self.noise_dim)
        nn.init.trunc_normal_(noise, a=-2.0, b=2.0, generator=random)
        vectors = torch.randn(count, self.class_dim, generator=random) * spread
        parts = [noise * self.truncation] * (self.noise is None) + [vectors] * (self.class_vector is None)
        return torch.cat(parts, dim=1)

    def settings(self) -> dict[str, Any]:
        """What it takes to make this generator again, JSON-able; of the network itself only `label`."""
        return {
            "generator": self.name,
            "label": self.label,
            "height": self.height,
            "width": self.width,
            "noise_dim": self.noise_dim,
            "class_dim": self.class_dim,
            "truncation": self.truncation,
            "noise": None if self.noise is None else self.noise.tolist(),
            "class_vector": None if self.class_vector is None else self.class_vector.tolist(),
            "batch": self.batch,
        }

    def _images(self, codes: Tensor) -> Tensor:
        images = []
        device = next((p.device for p in self.network.parameters()), codes.device)
        for part in torch.split(codes.to(device), self.batch):
            filled = torch.cat((part, part[-1:].expand(self.batch - len(part), -1)))
            noise, vectors = self._vectors(filled)
            found = self._call(noise, vectors, self.truncation)
            if tuple(found.shape) != (self.batch, 3, self.height, self.width):
                raise ValueError(
                    f"the network should return [{self.batch}, 3, {self.height}, {self.width}], got "
                    f"{list(found.shape)}; give height and width of its images"
                )
            images.append(((found[: len(part)].to(torch.float32) + 1) / 2).clamp(0, 1).to(codes.device))
        return torch.cat(images)

    def _vectors(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Noise and class vectors of codes, each [b, ...]."""
        if self.noise is not None:
            return self.noise.to(codes.device).expand(len(codes), -1), codes
        if self.class_vector is not None:
            return codes, self.class_vector.to(codes.device).expand(len(codes), -1)
        return codes[:, : self.noise_dim], codes[:, self.noise_dim :]

    def _concatenated(self, noise: Tensor, vectors: Tensor, truncation: float) -> Tensor:
        found: Tensor = self.network(torch.cat((noise, vectors), dim=1), truncation)
        return found


def _fixed(name: str, vector: ArrayLike | Tensor | None, length: int) -> Tensor | None:
    if vector is None:
        return None
    found = torch.as_tensor(vector, dtype=torch.float32).detach().clone()
    if tuple(found.shape) != (length,) or not bool(found.isfinite().all()):
        raise ValueError(f"{name} should be {length} finite numbers, got {list(found.shape)}")
    return found

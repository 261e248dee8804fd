"""Saliency of many neurons on one image, on a CPU: against captum, neuron by neuron and batched, and torch.func.

    python benchmarks/bench_saliency.py [--only shared,bank,network,integrated] [--threads 1] [--record]

Each part runs in a process of its own with a fixed number of threads; within a part, candidate and peers alternate.
Before any clock starts, every contender's maps are compared with float64 ones; ours being wrong fails the run. About
three minutes for all parts.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import cortexloop as cl
import runner
from bench_bank import WrongResultError, isa
from cases import all_models, random_images
from cortexloop import attribution, features
from cortexloop.models import CompactModel, SharedCompactModel
from cortexloop.testing import SmallResNet
from record import Contender, Row, measure, provenance, quantiles

K = 64
"""Neurons per image."""
SHARED_FILTERS = (35, 35, 35, 100, 100)
"""Of the shared model: 35 filters come within 5 % of the ensemble in the paper."""
SHARED_NEURONS = 219
STEPS = 16
"""Points of integrated gradients."""
LIMIT = 3e-2
"""Largest RMS difference from the float64 maps, relative to their RMS. float32 flips a few ReLUs near 0."""

OURS = "cortexloop"
LOOP, EXPANDED, VMAP = "captum, one neuron after another", "captum, image repeated", "torch.func, vmap of vjp"


class Outputs(nn.Module):
    """Linear readouts of features: what captum is given. Images in the form that the network takes."""

    def __init__(self, trunk: Callable[[Tensor], Tensor], weights: Tensor) -> None:
        super().__init__()
        self.trunk = trunk
        self.weights = nn.Parameter(weights.flatten(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, K]."""
        return self.trunk(x).flatten(1) @ self.weights.T


def frozen(module: nn.Module) -> nn.Module:
    """Without gradients of weights, as a careful user of captum has it."""
    return module.eval().requires_grad_(False)


def captum_loop(model: nn.Module, x: Tensor, neurons: Sequence[int]) -> Tensor:
    """[K, ...image]."""
    from captum.attr import Saliency

    saliency, image = Saliency(model), x.clone().requires_grad_()
    return torch.cat([saliency.attribute(image, target=n, abs=False) for n in neurons])


def captum_expanded(model: nn.Module, x: Tensor, neurons: Sequence[int]) -> Tensor:
    """The way around it that captum's maintainers give: the image once for each neuron."""
    from captum.attr import Saliency

    images = x.expand(len(neurons), *x.shape[1:]).contiguous().requires_grad_()
    return Saliency(model).attribute(images, target=torch.tensor(neurons), abs=False)


def func_vmap(model: nn.Module, x: Tensor, neurons: Sequence[int]) -> Tensor:
    """One forward pass and all backward passes as one."""
    outputs, pull = torch.func.vjp(model, x)
    cotangents = torch.zeros(len(neurons), *outputs.shape)
    cotangents[torch.arange(len(neurons)), 0, torch.tensor(neurons)] = 1
    (maps,) = torch.func.vmap(pull)(cotangents)
    return maps[:, 0]


def check(contenders: Sequence[Contender], exact: NDArray[np.float64]) -> list[Contender]:
    """Those that give the float64 maps. The first one is ours.

    Raises:
        WrongResultError: ours does not.
    """
    right = []
    for contender in contenders:
        maps = contender.fetch()
        error = np.sqrt(np.mean((maps - exact) ** 2) / np.mean(exact**2)) if maps.shape == exact.shape else np.inf
        if error <= LIMIT:
            right.append(contender)
        elif contender is contenders[0]:
            raise WrongResultError(f"{contender.name}: maps are off by {error:.3g} of their RMS, {LIMIT:g} is right")
        else:
            print(f"no number for {contender.name}: maps are off by {error:.3g} of their RMS", file=sys.stderr)
    return right


def rows_of(
    case: str,
    direction: str,
    contenders: Sequence[Contender],
    threads: int,
    budget: float,
    rounds: tuple[int, int],
    neurons: int = K,
) -> list[Row]:
    """Milliseconds per neuron, and ratios to ours."""
    times = measure(contenders, budget=budget, min_rounds=rounds[0], max_rounds=rounds[1])
    first = contenders[0].name
    rows = []
    for contender in contenders:
        seconds = times[contender.name]
        q50, q20, q80 = quantiles(seconds * 1e3 / neurons)
        ratio, ratio_q20, ratio_q80 = quantiles(seconds / times[first])
        ours = contender.name == OURS
        package = "captum" if contender.name.startswith("captum") else "torch"
        version = str(cl.__version__) if ours else importlib.metadata.version(package)
        where: dict[str, Any] = dict(provenance())
        rows.append(
            Row(
                case=case, batch=neurons, op="saliency", direction=direction, backend=contender.name, version=version,
                isa=isa() if ours else "", threads=threads, metric="time", unit="ms/neuron", q50=q50, q20=q20, q80=q80,
                rounds=len(seconds), ratio_to=first, ratio=ratio, ratio_q20=ratio_q20, ratio_q80=ratio_q80, **where,
            )
        )  # fmt: skip
    return rows


def contender(name: str, run: Callable[[], Tensor], *, nchw: bool = False) -> Contender:
    """`run` gives maps [K, H, W, 3], or [K, 3, H, W]."""

    def fetch() -> NDArray[np.float64]:
        maps = run()
        return (maps.permute(0, 2, 3, 1) if nchw else maps).double().numpy()

    return Contender(name, run, fetch)


def float64_maps(model: nn.Module, x: Tensor, neurons: Sequence[int]) -> Tensor:
    """The yardstick; the model is float64 while this runs."""
    model.double()
    leaf = x.double().requires_grad_()
    outputs = model(leaf)
    maps = torch.stack([torch.autograd.grad(outputs[0, n], leaf, retain_graph=True)[0][0] for n in neurons])
    model.float()
    return maps


# --- the parts: each returns rows -----------------------------------------------------------------------------------


def shared() -> tuple[attribution.Readout, nn.Module, Tensor, Tensor]:
    """Readout on the bank's kernels, the module, the image as levels and recentred."""
    module = SharedCompactModel(SHARED_FILTERS, SHARED_NEURONS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # batch norm as training leaves it: every map at unit scale
        images = torch.from_numpy(random_images(8, np.random.default_rng(1)))
        for norm in (part for part in module.modules() if isinstance(part, nn.BatchNorm2d)):
            norm.momentum = None
        module.train()(cl.recenter(images))
    frozen(module)
    levels = torch.from_numpy(random_images(1, np.random.default_rng(0)))
    return attribution.Readout.of_shared(module.to_weights("shared")), module, levels, cl.recenter(levels)


def part_shared(threads: int, budget: float) -> list[Row]:
    """Gradients of 64 neurons of a shared compact model."""
    readout, module, levels, x = shared()
    saliency, neurons = attribution.Saliency(readout), list(range(K))
    exact = float64_maps(module, x, neurons).numpy()
    entries = [
        contender(OURS, lambda: saliency.attribute(levels, neurons)[0]),
        contender(LOOP, lambda: captum_loop(module, x, neurons)),
        contender(EXPANDED, lambda: captum_expanded(module, x, neurons)),
        contender(VMAP, lambda: func_vmap(module, x, neurons)),
    ]
    case = f"shared model {'-'.join(map(str, SHARED_FILTERS))}, 1 image"
    return rows_of(case, "gradient", check(entries, exact), threads, budget, (3, 12))


def part_integrated(threads: int, budget: float) -> list[Row]:
    """Integrated gradients of 16 neurons of the same model."""
    readout, module, levels, x = shared()
    method, some = attribution.IntegratedGradients(readout, steps=STEPS), list(range(K // 4))

    def loop() -> Tensor:
        from captum.attr import IntegratedGradients

        captum = IntegratedGradients(module)
        return torch.cat([captum.attribute(x, target=n, n_steps=STEPS) for n in some])

    def ours() -> Tensor:
        return method.attribute(levels, some)[0]

    source = features.ModuleFeatures(module.double(), "trunk", preprocess=features.Preprocess.recentred(112))
    double = attribution.Readout(source, torch.einsum("hwn,cn->nchw", module.spatial, module.mixing)[: K // 4])
    exact = attribution.IntegratedGradients(double, steps=STEPS).attribute(levels.double())[0].numpy()
    module.float()
    entries = [contender(OURS, ours), contender(LOOP, loop)]
    case = f"shared model {'-'.join(map(str, SHARED_FILTERS))}, 1 image, {STEPS} points"
    return rows_of(case, "integrated gradients", check(entries, exact), threads, budget, (3, 6), K // 4)


def part_bank(threads: int, budget: float) -> list[Row]:
    """Gradients of 64 compact models, each a network of its own: nothing is shared but the image."""
    case = all_models()
    models = [case.models[n % len(case.models)] for n in range(0, 3 * K, 3)]
    models = [type(m)(f"{n}", *[getattr(m, f) for f in ("layers", "readout", "readout_bias", "height", "width")],
                      image_mean=m.image_mean) for n, m in enumerate(models)]  # fmt: skip
    bank = cl.ModelBank(models)
    modules = [frozen(CompactModel.from_weights(m)) for m in models]
    levels = torch.from_numpy(case.images[:1])
    x = cl.recenter(levels, bank.image_mean)
    saliency = attribution.Saliency(bank)

    def loop() -> Tensor:
        from captum.attr import Saliency

        image = x.clone().requires_grad_()
        return torch.cat([Saliency(module).attribute(image, abs=False) for module in modules])

    exact = torch.cat([float64_maps(OneOutput(module), x, [0]) for module in modules]).numpy()
    entries = [contender(OURS, lambda: saliency.attribute(levels)[0]), contender(LOOP, loop)]
    return rows_of(f"{case.name}, {K} of them, 1 image", "gradient", check(entries, exact), threads, budget, (3, 12))


class OneOutput(nn.Module):
    """[B] -> [B, 1]."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1]."""
        return self.module(x)[:, None]


def part_network(threads: int, budget: float) -> list[Row]:
    """Gradients of 64 readouts of layer3 of a residual network, of ResNet-50's form and a quarter of its width."""
    size = 112
    network = frozen(SmallResNet(width=16, blocks=(3, 4, 6, 1)))
    preprocess = features.Preprocess.imagenet(size)
    source = features.ModuleFeatures(network, "layer3", preprocess=preprocess)
    weights = torch.randn((K, *source.feature_shape()), generator=torch.Generator().manual_seed(0))
    saliency, neurons = attribution.Saliency(attribution.Readout(source, weights)), list(range(K))
    trunk = nn.Sequential(
        network.conv1, network.bn1, network.relu, network.maxpool, network.layer1, network.layer2, network.layer3
    )
    module = Outputs(trunk, weights)
    levels = torch.from_numpy(random_images(1, np.random.default_rng(0), size))
    x = preprocess(levels)
    gain = torch.tensor([preprocess.scale / s for s in preprocess.std], dtype=torch.float64)[:, None, None]

    def in_levels(maps: Tensor) -> Tensor:
        """Gradients by level from those by normalised input, [K, 3, H, W]."""
        return maps * gain

    exact = in_levels(float64_maps(module, x, neurons)).permute(0, 2, 3, 1).numpy()
    entries = [
        contender(OURS, lambda: saliency.attribute(levels)[0]),
        contender(LOOP, lambda: in_levels(captum_loop(module, x, neurons)), nchw=True),
        contender(EXPANDED, lambda: in_levels(captum_expanded(module, x, neurons)), nchw=True),
        contender(VMAP, lambda: in_levels(func_vmap(module, x, neurons)), nchw=True),
    ]
    return rows_of("residual network, layer3, 1 image", "gradient", check(entries, exact), threads, budget, (3, 12))


PARTS: dict[str, Callable[[int, float], list[Row]]] = {
    "shared": part_shared,
    "bank": part_bank,
    "network": part_network,
    "integrated": part_integrated,
}


if __name__ == "__main__":
    sys.exit(runner.main(__file__, __doc__, PARTS, threads="1", budget=20.0))

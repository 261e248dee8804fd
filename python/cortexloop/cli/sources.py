"""Where features come from, as the command line says it: a layer of a compact model or of any torch network."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import cortexloop as cl
from cortexloop import features, io, models, textbook
from cortexloop.cli.console import BadInputError, bad_input, sentence

PRETRAINED = "pretrained"
"""Word for the weights that the network's own package publishes, which it may download."""

FILTERS = "filters"
"""Name of the built-in network."""

_POOL = "/spatial_pool/depthwise_kernel"


@dataclass(frozen=True)
class SourceOptions:
    """See the options of the commands."""

    models: Path | None = None
    model: str | None = None
    layer: str | None = None
    network: str | None = None
    weights: str | None = None
    size: str | None = None
    mean: str | None = None
    std: str | None = None
    batch: int = 64
    device: str = "auto"
    seed: int = 0
    """Of random weights, where a network has no others."""

    @property
    def given(self) -> bool:
        """Whether a source was named."""
        return self.models is not None or self.network is not None

    def stored(self) -> dict[str, Any]:
        """As JSON, files by their absolute paths; `restored` reads it."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("batch", "device")}
        if self.weights is not None and self.weights != PRETRAINED:
            kept["weights"] = str(Path(self.weights).resolve())
        if self.network is not None and ".py:" in self.network:
            kept["network"] = str(Path(self.network).resolve())
        return {k: str(v.resolve()) if isinstance(v, Path) else v for k, v in kept.items()}


def restored(stored: dict[str, Any], *, batch: int, device: str) -> SourceOptions:
    """Options that `stored` wrote. KeyError, TypeError: something else wrote it."""
    paths = {k: Path(v) for k, v in stored.items() if k == "models" and v is not None}
    return SourceOptions(**{**stored, **paths}, batch=batch, device=device)


@dataclass(frozen=True, eq=False)
class OpenSource:
    """A source of features with what a report says about it.

    Attributes:
        channels: what each channel is, where that is known.
        notes: what a user should know about the weights.
    """

    source: features.FeatureSource
    size: tuple[int, int]
    channels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def open_source(options: SourceOptions) -> OpenSource:
    """The features that the options name; the built-in filters if they name none.

    Raises:
        BadInputError: a file, network, layer or option that cannot be used.
    """
    if options.batch < 1:
        raise BadInputError(f"--batch should be at least 1, got {options.batch}")
    if options.models is not None and options.network is not None:
        raise BadInputError("--models and --network are two sources of features: give one of them")
    if options.models is not None:
        for name in ("weights", "size", "mean", "std"):
            if getattr(options, name) is not None:
                raise BadInputError(f"--{name} belongs to --network; compact models bring their own")
        return _compact(options)
    if options.model is not None:
        raise BadInputError("--model needs the --models that it is one of")
    device = settle_torch_device(options.device)
    if options.network is None or options.network == FILTERS:
        return _filters(options, device)
    return _network(options, device)


def settle_torch_device(device: str) -> torch.device:
    """Where torch computes: "auto" is the first GPU, if there is one. Raises BadInputError."""
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if re.fullmatch(r"cpu|cuda(?::\d{1,3})?", device) is None:
        raise BadInputError(f"--device should be auto, cpu, cuda or a numbered one such as cuda:1, got {device!r}")
    found = torch.device(device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise BadInputError(f"--device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here")
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else found


def closest(name: str, names: Sequence[str]) -> str:
    """Names like one that is not there, as the end of a sentence."""
    near = difflib.get_close_matches(name, names, 3, 0.5) or list(names[:5])
    return ", ".join(near) + (", ..." if len(names) > len(near) else "")


# ---------------------------------------------------------------------------------------------- compact models


def _compact(options: SourceOptions) -> OpenSource:
    path = options.models
    assert path is not None
    shared = _shared_names(path)
    with bad_input():
        if shared:
            name = _one(shared, options.model, path)
            weights: Any = io.load_shared(path, names=[name])[0]
        else:
            with io.open_models(path) as files:
                name = _one(files.names, options.model, path)
                weights = files.read(name)
    layer = _compact_layer(options.layer, len(weights.layers), name)
    size = (weights.height, weights.width)
    device = settle_torch_device(options.device)
    with bad_input():
        if shared:
            trunk = models.SharedCompactModel.from_weights(weights).trunk.requires_grad_(False).to(device)
            taken = features.Preprocess.recentred(size, weights.image_mean)
            source: features.FeatureSource = features.ModuleFeatures(
                trunk, f"layers.{layer}", preprocess=taken, batch=options.batch, name=f"{name}.layer{layer}"
            )
        else:
            bank = cl.ModelBank.from_weights([weights]).to(device)
            source = features.BankFeatures(bank, 0, layer, batch=options.batch)
    return OpenSource(source, size)


def _shared_names(path: Path) -> list[str]:
    """Names of the shared compact models in an .npz; empty for every other file, readable or not."""
    if path.suffix != ".npz" or not path.is_file():
        return []
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return [name.removesuffix(_POOL) for name in archive.files if name.endswith(_POOL)]
    except Exception:  # a damaged archive raises many kinds of exception; the reader of models says what is wrong
        return []


def _one(names: Sequence[str], wanted: str | None, path: Path) -> str:
    if wanted is None:
        if len(names) == 1:
            return names[0]
        raise BadInputError(f"{str(path)!r} holds {len(names)} models: choose one with --model ({closest('', names)})")
    if wanted not in names:
        raise BadInputError(f"--model {wanted!r} is not in {str(path)!r}; there is {closest(wanted, names)}")
    return wanted


def _compact_layer(layer: str | None, depth: int, name: str) -> int:
    if layer is None:
        return depth - 1
    found = re.fullmatch(r"(?:layers?[._]?)?(\d{1,3})", layer.strip())
    if found is None or int(found[1]) >= depth:
        raise BadInputError(
            f"--layer {layer!r}: model {name!r} has the layers {', '.join(f'layer{i}' for i in range(depth))}"
        )
    return int(found[1])


# ---------------------------------------------------------------------------------------------------- networks


def _filters(options: SourceOptions, device: torch.device) -> OpenSource:
    from cortexloop.cli.fitting.example import LAYER, FilterNetwork

    network = FilterNetwork().eval().to(device)
    taken = features.Preprocess(textbook.SIZE, (0.5,) * 3, (1.0,) * 3)
    with bad_input():
        source = features.ModuleFeatures(
            network, options.layer or LAYER, preprocess=taken, batch=options.batch,
            name=f"built-in filters, {options.layer or LAYER}",
        )  # fmt: skip
    named = network.channels if source.feature_shape()[0] == len(network.channels) else None
    return OpenSource(source, (textbook.SIZE, textbook.SIZE), named)


def _network(options: SourceOptions, device: torch.device) -> OpenSource:
    assert options.network is not None
    if options.layer is None:
        raise BadInputError("--network needs --layer, the name of the layer whose maps are the features")
    torch.manual_seed(options.seed)  # of weights that no file replaces
    package, _, name = options.network.partition(":")
    makers = {"torchvision": _torchvision, "timm": _timm}
    if package in makers and name:
        module, size, mean, std = makers[package](name, options)
    elif name and package.endswith(".py"):
        module, size = _from_file(Path(package), name), None
        mean, std = features.preprocess.IMAGENET_MEAN, features.preprocess.IMAGENET_STD
        name = f"{Path(package).stem}.{name}"
    else:
        raise BadInputError(
            f"--network should be torchvision:NAME, timm:NAME or FILE.py:FUNCTION, got {options.network!r}"
        )
    module = module.eval().requires_grad_(False)
    notes: list[str] = []
    if options.weights is not None and options.weights != PRETRAINED:
        with bad_input():
            own = features.load_robust_checkpoint(module, options.weights)
        if own is not None:
            mean, std = own
    elif options.weights is None and package in makers:
        notes.append(
            f"the network has random weights (seed {options.seed}): give --weights FILE, or --weights {PRETRAINED}"
        )
    size = _size(options.size) or size
    if size is None:
        raise BadInputError(f"--network {options.network} needs --size, the height and width in pixels that it takes")
    mean, std = _triple("mean", options.mean) or mean, _triple("std", options.std) or std
    with bad_input():
        source = features.ModuleFeatures(
            module.to(device), options.layer, preprocess=features.Preprocess(size, mean, std), batch=options.batch,
            name=f"{name}.{options.layer}",
        )  # fmt: skip
    return OpenSource(source, size, None, tuple(notes))


Made = tuple[nn.Module, tuple[int, int] | None, Sequence[float], Sequence[float]]


def _torchvision(name: str, options: SourceOptions) -> Made:
    package = _package("torchvision.models")
    known = list(package.list_models(module=package))
    if name not in known:
        raise BadInputError(
            f"--network torchvision:{name}: there is no such network; similar are {closest(name, known)}"
        )
    weights = "DEFAULT" if options.weights == PRETRAINED else None
    module = _made(lambda: package.get_model(name, weights=weights), options)
    return module, (224, 224), features.preprocess.IMAGENET_MEAN, features.preprocess.IMAGENET_STD


def _timm(name: str, options: SourceOptions) -> Made:
    package = _package("timm")
    known = list(package.list_models())
    if name.partition(".")[0] not in known:
        raise BadInputError(f"--network timm:{name}: there is no such network; similar are {closest(name, known)}")
    module = _made(lambda: package.create_model(name, pretrained=options.weights == PRETRAINED), options)
    config = getattr(module, "default_cfg", {})
    size = tuple(config.get("input_size", (3, 224, 224))[1:])
    mean = config.get("mean", features.preprocess.IMAGENET_MEAN)
    return module, size, mean, config.get("std", features.preprocess.IMAGENET_STD)


def _package(name: str) -> Any:
    first = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise BadInputError(f"--network {first}:... needs {first}: pip install {first}") from error
    except (ImportError, RuntimeError, OSError) as error:
        raise BadInputError(f"{first} is installed, but cannot be imported: {sentence(error)}") from error


def _made(make: Any, options: SourceOptions) -> nn.Module:
    """The network; what a package raises on the way (no download, no memory) is told in one sentence."""
    try:
        module = make()
    except Exception as error:
        raise BadInputError(f"--network {options.network} cannot be made: {sentence(error)}") from error
    if not isinstance(module, nn.Module):
        raise BadInputError(f"--network {options.network} gives a {type(module).__name__}, expected a torch.nn.Module")
    return module


def _from_file(path: Path, function: str) -> nn.Module:
    if not path.is_file():
        raise BadInputError(f"--network: no such file {str(path)!r}")
    spec = importlib.util.spec_from_file_location(f"_network_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    space = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(space)
    except Exception as error:
        raise BadInputError(
            f"--network: {str(path)!r} cannot be run: {type(error).__name__}: {sentence(error)}"
        ) from error
    maker = getattr(space, function, None)
    if not callable(maker):
        there = [name for name, value in vars(space).items() if callable(value) and not name.startswith("_")]
        raise BadInputError(
            f"--network: {str(path)!r} has no function {function!r}; there is {closest(function, there) or 'none'}"
        )
    try:
        module = maker()
    except Exception as error:
        raise BadInputError(
            f"--network: {function}() of {str(path)!r} fails: {type(error).__name__}: {sentence(error)}"
        ) from error
    if not isinstance(module, nn.Module):
        raise BadInputError(
            f"--network: {function}() of {str(path)!r} gives a {type(module).__name__}, expected a torch.nn.Module"
        )
    return module


def _size(text: str | None) -> tuple[int, int] | None:
    """A number, or "height,width" or "heightxwidth"."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d{1,5})(?:\s*[x,]\s*(\d{1,5}))?\s*", text)
    if found is None or not int(found[1]) or not int(found[2] or 1):
        raise BadInputError(f"--size should be one number of pixels, or height and width as '224x224', got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def _triple(name: str, text: str | None) -> tuple[float, float, float] | None:
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) == 1:
        values *= 3
    if len(values) != 3 or not np.isfinite(values).all() or (name == "std" and min(values) <= 0):
        raise BadInputError(f"--{name} should be one number or three (R,G,B) in units of 0..1, got {text!r}")
    return values

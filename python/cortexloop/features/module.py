"""`ModuleFeatures`: the output of a layer inside any torch module."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cortexloop.features.base import FeatureSource, check_batch, check_differentiable
from cortexloop.features.layers import find_layer
from cortexloop.features.preprocess import Preprocess

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Reached(BaseException):
    """The layer has its output. Not an `Exception`, so that no network's own handler takes it for an error."""


class _Watch:
    """Counts the calls of a layer within the block and keeps the output of one of them.

    The hook acts only for the thread that entered the block: others may run the same module meanwhile.
    """

    def __init__(self, layer: nn.Module, occurrence: int, *, stop: bool) -> None:
        self.layer, self.occurrence, self.stop = layer, occurrence, stop
        self.calls = 0
        self.output: Any = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Register the hook, and remove it whatever happens."""
        thread = threading.get_ident()

        def hook(_layer: nn.Module, _inputs: Any, output: Any) -> None:
            if threading.get_ident() != thread:
                return
            self.calls += 1
            if self.calls - 1 == self.occurrence:
                # What comes behind may work in place on this very tensor; where it is stopped, nothing does.
                self.output = output if self.stop or not isinstance(output, Tensor) else output.clone()
                if self.stop:
                    raise _Reached

        handle = self.layer.register_forward_hook(hook)
        try:
            yield
        except _Reached:
            pass
        finally:
            handle.remove()


class ModuleFeatures(FeatureSource):
    """Features are the output of one layer of a torch module; nothing behind that layer is computed.

    The module is used as it is: its weights, modes and hooks are left alone, and it has to be in evaluation mode. A
    grey image is shown to it when the source is made, to learn the shape of the maps and how often the layer is called.

    Args:
        module: takes images [B, 3, H, W] (or [B, H, W, 3], see `Preprocess.layout`) as its only argument.
        layer: a name of `module.named_modules()`; a leading dot and published forms such as "layer3.Bottleneck5" are
            understood, see `find_layer`.
        preprocess: from pixel levels to the module's input.
        size, mean, std: instead of `preprocess`: of a module that takes images of 0..1, normalised.
        batch: images at a time.
        precision: "float32" (the module's own dtype), or "bfloat16" or "float16" by autocast; features are float32
            either way. On a GPU, torch's own switch decides whether "float32" convolutions use TF32.
        channels_last: show the images in torch's channels_last memory format.
        layout: axes of the layer's output if it has four: "NCHW" or "NHWC" (as in some transformers).
        occurrence: which call of the layer within one forward pass, from 0, if there are several (a shared ReLU).
        device: where the module is; needed only for a module without parameters.
        name: default: the module's class and the layer.

    Raises:
        TypeError: not a module, or one that takes no hooks (TorchScript).
        ValueError: an unknown layer, option or device; a module in training mode; a layer called several times or
            not at all; an output that is not a map.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: str,
        *,
        preprocess: Preprocess | None = None,
        size: tuple[int, int] | int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        batch: int = 64,
        precision: str = "float32",
        channels_last: bool = False,
        layout: str = "NCHW",
        occurrence: int | None = None,
        device: torch.device | str | None = None,
        name: str | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module should be a torch.nn.Module, got {type(module).__name__}")
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError("layers of a TorchScript module cannot be watched; give the Python module")
        if precision not in PRECISIONS:
            raise ValueError(f"precision should be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if layout not in ("NCHW", "NHWC"):
            raise ValueError(f'layout should be "NCHW" or "NHWC", got {layout!r}')
        if occurrence is not None and occurrence < 0:
            raise ValueError(f"occurrence should be 0 or more, got {occurrence}")
        self.module = module
        self.preprocess = _preprocess(preprocess, size, mean, std)
        self.layer, self._layer = find_layer(module, layer)
        self.batch = check_batch(batch)
        self.precision, self.channels_last, self.layout = precision, channels_last, layout
        self.name = f"{type(module).__name__.lower()}.{self.layer}" if name is None else name
        self._device, self._input_dtype = _place(module, device)
        self.occurrence = 0 if occurrence is None else occurrence
        self._shape = self._probe(occurrence)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self._input_dtype == torch.float64 else torch.float32

    def feature_shape(self) -> tuple[int, int, int]:
        return self._shape

    def settings(self) -> dict[str, Any]:
        return {
            "kind": "module",
            "module": type(self.module).__name__,
            "layer": self.layer,
            "occurrence": self.occurrence,
            "layout": self.layout,
            "precision": self.precision,
            "channels_last": self.channels_last,
            "batch": self.batch,
            "preprocess": self.preprocess.settings(),
        }

    def differentiable(self, images: Tensor) -> Tensor:
        check_differentiable(images, self._device)
        return self._compute(images)

    def _compute(self, images: Tensor) -> Tensor:
        watch = _Watch(self._layer, self.occurrence, stop=True)
        with watch.watching():
            self._forward(images)
        if watch.output is None:
            raise RuntimeError(
                f"layer {self.layer!r} was called {watch.calls} times for these images, call {self.occurrence} is "
                "asked for: the module does not treat all images alike"
            )
        return self._as_maps(watch.output)

    def _forward(self, images: Tensor) -> Any:
        training = next((name for name, part in self.module.named_modules() if part.training), None)
        if training is not None:
            where = f"its part {training!r}" if training else "it"
            raise ValueError(f"the module has to be in evaluation mode, {where} is in training mode: module.eval()")
        x = self.preprocess(images, self._input_dtype)
        if self.channels_last and self.preprocess.layout == "NCHW":
            x = x.contiguous(memory_format=torch.channels_last)
        reduced = PRECISIONS[self.precision]
        with torch.autocast(self._device.type, reduced, enabled=reduced is not None):
            return self.module(x)

    def _as_maps(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"layer {self.layer!r} gives a {type(output).__name__}, features are a tensor: name a layer inside it"
            )
        if not output.is_floating_point():
            raise ValueError(f"layer {self.layer!r} gives {output.dtype}, features are floating")
        if output.ndim == 2:
            output = output[:, :, None, None]
        elif output.ndim != 4:
            raise ValueError(
                f"layer {self.layer!r} gives {list(output.shape)}, features are maps [B, C, H, W] or vectors [B, C]: "
                "name another layer"
            )
        elif self.layout == "NHWC":
            output = output.permute(0, 3, 1, 2)
        maps: Tensor = output.to(self.dtype).contiguous()
        return maps

    def _probe(self, occurrence: int | None) -> tuple[int, int, int]:
        """The shape of the maps. Without an `occurrence`, the whole forward pass is run, to count the calls."""
        grey = torch.full(
            (1, self.preprocess.height, self.preprocess.width, 3), 128, dtype=torch.uint8, device=self._device
        )
        watch = _Watch(self._layer, self.occurrence, stop=occurrence is not None)
        with torch.no_grad(), watch.watching():
            try:
                self._forward(grey)
            except Exception as error:
                if not watch.calls:
                    raise
                raise ValueError(
                    f"the module fails behind layer {self.layer!r} ({error}), so that its calls cannot be counted; say "
                    "occurrence=0 to take the first one"
                ) from error
        if watch.calls == 0:
            raise ValueError(f"layer {self.layer!r} is not used in the module's forward pass")
        if watch.output is None:
            raise ValueError(
                f"layer {self.layer!r} is called {watch.calls} times in a forward pass, there is no call {occurrence}"
            )
        if occurrence is None and watch.calls > 1:
            raise ValueError(
                f"layer {self.layer!r} is called {watch.calls} times in a forward pass; say which call is meant by "
                f"occurrence=0..{watch.calls - 1}, or name another layer"
            )
        channels, height, width = self._as_maps(watch.output).shape[1:]
        return channels, height, width


def _preprocess(
    preprocess: Preprocess | None,
    size: tuple[int, int] | int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Preprocess:
    given = [value is not None for value in (size, mean, std)]
    if preprocess is not None:
        if any(given):
            raise ValueError("give either preprocess, or size, mean and std")
        return preprocess
    if size is None or mean is None or std is None:
        raise ValueError(
            "say what the module takes: preprocess=Preprocess.imagenet(224), or size, mean and std (of images of 0..1)"
        )
    return Preprocess(size, mean, std)


def _place(module: nn.Module, device: torch.device | str | None) -> tuple[torch.device, torch.dtype]:
    """Device and input dtype of a module."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    wanted = None if device is None else torch.empty(0, device=device).device
    if not tensors:
        return wanted or torch.device("cpu"), torch.float32
    places = {t.device for t in tensors}
    if len(places) > 1:
        raise ValueError(f"the module's parameters lie on several devices: {', '.join(sorted(map(str, places)))}")
    found = places.pop()
    if wanted is not None and wanted != found:
        raise ValueError(f"the module is on {found}, device says {wanted}: move it, module.to('{wanted}')")
    return found, tensors[0].dtype

"""Layers of a module by name."""

from __future__ import annotations

import difflib

from torch import nn


def find_layer(module: nn.Module, name: str) -> tuple[str, nn.Module]:
    """The layer of that name, and its name in `module.named_modules()`.

    A leading dot is ignored, and a part of the name may be a child's class with its name or number, as in the published
    "layer3.Bottleneck5" for "layer3.5".

    Raises:
        ValueError: there is no such layer; the sentence lists names that are near.
    """
    wanted = name.strip().removeprefix(".")
    layers = dict(module.named_modules())
    if wanted and wanted in layers:
        return wanted, layers[wanted]
    current, path = module, []
    for part in wanted.split("."):
        found = next(
            (
                (key, child)
                for number, (key, child) in enumerate(current.named_children())
                if part in (key, type(child).__name__ + key, f"{type(child).__name__}{number}")
            ),
            None,
        )
        if found is None:
            raise ValueError(_unknown(module, name, wanted, [key for key in layers if key]))
        path.append(found[0])
        current = found[1]
    return ".".join(path), current


def _unknown(module: nn.Module, name: str, wanted: str, names: list[str]) -> str:
    near = difflib.get_close_matches(wanted, names, n=5, cutoff=0.5)
    last = wanted.rsplit(".", 1)[-1].lower()
    near += [key for key in names if last and last in key.lower() and key not in near][: 5 - len(near)]
    hint = f"near are {', '.join(near)}" if near else f"its layers start with {', '.join(names[:8])}"
    return f"{type(module).__name__} has no layer {name!r}; {hint}"

"""Every public name is documented, and `__all__` is honest."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from types import ModuleType

import cortexloop


def public_modules() -> list[ModuleType]:
    """All modules of the package without an underscore in their path; importing them proves that they import."""
    names = [info.name for info in pkgutil.walk_packages(cortexloop.__path__, "cortexloop.")]
    if importlib.util.find_spec("triton") is None:  # only the folder itself imports without it
        names = [name for name in names if not name.startswith("cortexloop.backends.triton.")]
    public = [name for name in names if not any(part.startswith("_") for part in name.split("."))]
    return [importlib.import_module(name) for name in ("cortexloop", *public)]


def test_every_module_says_what_it_is_for():
    assert [m.__name__ for m in public_modules() if not (m.__doc__ or "").strip()] == []


def test_all_names_exist():
    missing = [f"{m.__name__}.{n}" for m in public_modules() for n in getattr(m, "__all__", ()) if not hasattr(m, n)]
    assert missing == []


def test_every_public_name_has_a_docstring():
    """Functions and classes everywhere in `__all__`, and the public methods and properties of those classes."""
    bare = set()
    for module in public_modules():
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if not (inspect.isclass(thing) or inspect.isfunction(thing)):
                continue
            if not (thing.__doc__ or "").strip():
                bare.add(f"{module.__name__}.{name}")
            if inspect.isclass(thing) and thing.__module__.startswith("cortexloop"):
                for attribute, value in vars(thing).items():
                    if attribute.startswith("_") or not (inspect.isfunction(value) or isinstance(value, classmethod)):
                        continue
                    if not (inspect.getdoc(getattr(thing, attribute)) or "").strip():
                        bare.add(f"{thing.__module__}.{thing.__name__}.{attribute}")
    assert sorted(bare) == []

"""A pickle machine that cannot run code: it knows data opcodes and the few constructors that its caller lists.

Python's own unpickler looks names up and calls them; this one interprets the opcodes itself, so that a name which is
not listed is refused before anything is imported, and damaged files end in ValueError and not in large allocations.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from cortexloop.io._archive import array_from_bytes

Symbol = tuple[str, str]
"""(module, name) of a global that a pickle mentions; it stays a pair of strings."""


class Buildable(Protocol):
    """What the BUILD opcode may act on."""

    def build(self, state: Any) -> None: ...


class StateDict(dict[str, Any]):
    """Stands for collections.OrderedDict, whose extra attributes (torch's `_metadata`) are of no use here."""

    def build(self, state: Any) -> None:
        """Ignore the attributes."""


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": StateDict,
}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_LITERALS |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class _Machine:
    def __init__(
        self,
        constructors: Mapping[Symbol, Callable[[tuple[Any, ...]], Any] | None],
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        self.constructors, self.persistent = constructors, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in ("PROTO", "FRAME"):
            return
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _TUPLES:
            count = _TUPLES[name]
            items = [self.pop() for _ in range(count)]
            stack.append(tuple(reversed(items)))
        elif name == "TUPLE":
            stack.append(tuple(self.pop_to_mark()))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.top()
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.top()
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise ValueError("the pickle refers to something that is not in it")
            stack.append(self.memo[argument])
        elif name in ("APPEND", "APPENDS"):
            items = [self.pop()] if name == "APPEND" else self.pop_to_mark()
            target = self.top()
            if type(target) is not list:
                raise ValueError("the pickle appends to something that is not a list")
            target.extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            self.set_items([self.pop(), self.pop()][::-1] if name == "SETITEM" else self.pop_to_mark())
        elif name == "GLOBAL":
            module, _, attribute = argument.partition(" ")
            self.push_symbol(module, attribute)
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            self.push_symbol(module, attribute)
        elif name == "REDUCE":
            self.reduce()
        elif name == "BUILD":
            state, target = self.pop(), self.top()
            if not hasattr(target, "build"):
                raise ValueError("the pickle sets the state of something that has none")
            target.build(state)
        elif name == "BINPERSID" and self.persistent is not None:
            stack.append(self.persistent(self.pop()))
        else:
            raise ValueError(f"the pickle uses {name}, which plain arrays do not need")

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("the pickle is damaged")
        return self.stack[-1]

    def pop(self) -> Any:
        self.top()
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        items = []
        while self.stack and self.stack[-1] is not _MARK:
            items.append(self.stack.pop())
        if not self.stack:
            raise ValueError("the pickle is damaged")
        self.stack.pop()
        return items[::-1]

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, StateDict) or len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
            raise ValueError("the pickle fills something that is not a dictionary of names")
        target.update(zip(items[::2], items[1::2], strict=True))

    def push_symbol(self, module: Any, attribute: Any) -> None:
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise ValueError("the pickle is damaged")
        if (module, attribute) not in self.constructors:
            raise ValueError(f"the pickle asks for {module}.{attribute}, which is refused: only plain arrays are read")
        self.stack.append((module, attribute))

    def reduce(self) -> None:
        arguments, symbol = self.pop(), self.pop()
        # Only listed pairs are keys, so a look-alike pair built in the pickle gains nothing by it.
        constructor = self.constructors.get(symbol) if is_symbol(symbol) else None
        if constructor is None or not isinstance(arguments, tuple):
            raise ValueError("the pickle calls something that cannot be called")
        self.stack.append(constructor(arguments))


def unpickle(
    data: bytes,
    constructors: Mapping[Symbol, Callable[[tuple[Any, ...]], Any] | None],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Interpret a pickle. `constructors` lists the admitted globals; one that is only mentioned maps to None.

    Raises:
        ValueError: the pickle is damaged, or needs anything that is not listed.
    """
    machine = _Machine(constructors, persistent)
    # Besides ValueError the decoder of opcodes raises these on damaged input.
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                result = machine.pop()
                if machine.stack:
                    raise ValueError("the pickle is damaged")
                return result
            machine.step(opcode.name, argument)
    except (OverflowError, LookupError) as error:
        raise ValueError(f"the pickle is damaged ({error})") from error
    raise ValueError("the pickle is cut short")


def is_symbol(value: Any) -> TypeGuard[Symbol]:
    """Whether a value from a pickle is a pair of texts; others are never hashed, compared or printed."""
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)


def is_shape(value: Any) -> bool:
    """Whether a value from a pickle is a tuple of non-negative integers."""
    return isinstance(value, tuple) and all(type(item) is int and item >= 0 for item in value)


class _DType:
    """Stands for numpy.dtype: a type code and a byte order."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        code = arguments[0] if arguments else None
        if not isinstance(code, str) or code not in ("f4", "f8", "O8"):
            raise ValueError("the pickle holds arrays of another type than float32 and float64")
        self.code, self.order = code, "<"

    def build(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if not isinstance(order, str) or order not in ("<", ">", "|", "="):
            raise ValueError("the pickle holds a damaged array type")
        self.order = order


class PickledArray:
    """Stands for numpy.ndarray: `value` is a numeric array, or a list for an object array."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.value: NDArray[Any] | list[Any] | None = None

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("the pickle holds a damaged array")
        _, shape, dtype, fortran, data = state
        if not is_shape(shape) or not isinstance(dtype, _DType) or type(fortran) is not bool:
            raise ValueError("the pickle holds a damaged array")
        if dtype.code == "O8":
            if not isinstance(data, list):
                raise ValueError("the pickle holds a damaged object array")
            self.value = data
        elif isinstance(data, bytes):
            self.value = array_from_bytes(data, dtype.order + dtype.code, shape, fortran=fortran)
        else:
            raise ValueError("the pickle holds a damaged array")


def unpickle_arrays(data: bytes) -> list[NDArray[Any]]:
    """The numeric arrays of a pickled one-dimensional object array, as `numpy.save` writes it.

    Raises:
        ValueError: damaged, or anything but an object array of float arrays.
    """
    constructors: dict[Symbol, Callable[[tuple[Any, ...]], Any] | None] = {("numpy", "ndarray"): None}
    constructors["numpy", "dtype"] = _DType
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before and since NumPy 2
        constructors[module, "_reconstruct"] = PickledArray
    outer = unpickle(data, constructors)
    if not isinstance(outer, PickledArray) or not isinstance(outer.value, list):
        raise ValueError("the pickle should hold one object array")
    arrays = []
    for item in outer.value:
        if not isinstance(item, PickledArray) or not isinstance(item.value, np.ndarray):
            raise ValueError("the object array should hold arrays of numbers only")
        arrays.append(item.value)
    return arrays

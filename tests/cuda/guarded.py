"""Memory that notices misuse: pages without access on both sides, known bytes in the margins, read-only inputs."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
MARGIN = 0xA5
NO_ACCESS, READ_ONLY = 0, 1  # PROT_NONE, PROT_READ

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """A buffer of exactly so many bytes.

    Its end, or with `at_start` its start, touches a page that cannot be accessed: the emulation reports a kernel that
    does. What `align` leaves between buffer and page holds known bytes, which `check` looks at.

    Args:
        size: bytes, 0 allowed.
        align: the address is a multiple of this.
        at_start: put the buffer behind the first page rather than in front of the last.
    """

    def __init__(self, size: int, align: int = 1, at_start: bool = False) -> None:
        pages = -(-size // PAGE) + 1
        self._map = mmap.mmap(-1, (pages + 2) * PAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._begin, self._end = base + PAGE, base + (pages + 1) * PAGE
        ctypes.memset(self._begin, MARGIN, pages * PAGE)
        self._protect(base, PAGE, NO_ACCESS)
        self._protect(self._end, PAGE, NO_ACCESS)
        self.size = size
        self.address = self._begin if at_start else (self._end - size) // align * align

    @staticmethod
    def _protect(address: int, size: int, access: int) -> None:
        if _libc.mprotect(address, size, access) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")

    def bytes(self) -> np.ndarray:
        """The buffer, uint8 [size]."""
        return np.frombuffer((ctypes.c_ubyte * self.size).from_address(self.address), np.uint8)

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The buffer as a tensor, which must not outlive it."""
        return torch.from_numpy(self.bytes()).view(dtype).view(shape)

    def read_only(self) -> None:
        """From now on, a store is a fault."""
        self._protect(self._begin, self._end - self._begin, READ_ONLY)

    def check(self) -> None:
        """Assert that the margins are as they were."""
        before = ctypes.string_at(self._begin, self.address - self._begin)
        after = ctypes.string_at(self.address + self.size, self._end - self.address - self.size)
        assert set(before) <= {MARGIN}, "something was written before a buffer"
        assert set(after) <= {MARGIN}, "something was written behind a buffer"


def guarded(x: Tensor, align: int | None = None, at_start: bool = False) -> Guarded:
    """A read-only copy of a tensor; aligned to its dtype unless told otherwise."""
    buffer = Guarded(x.numel() * x.element_size(), align or x.element_size(), at_start)
    if x.numel():
        buffer.bytes()[:] = x.contiguous().view(-1).view(torch.uint8).numpy()
    buffer.read_only()
    return buffer

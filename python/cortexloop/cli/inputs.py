"""Options that several commands have in common: which models, where to, how many threads, which backend."""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.markup import escape

import cortexloop as cl
from cortexloop import io, ops
from cortexloop.cli.console import BadInputError, bad_input, sentence, stderr


def load_bank(path: Path, neurons: Sequence[str] = ()) -> cl.ModelBank:
    """The models of a file or folder, or those of them that `neurons` chooses; only these are read.

    Raises:
        BadInputError: an unreadable source, or a choice that matches nothing.
    """
    with bad_input(), io.open_models(path) as files:
        chosen = choose(files.names, neurons)
        return cl.ModelBank.from_weights(files.read(name) for name in chosen)


def choose(names: Sequence[str], wanted: Sequence[str], what: str = "models") -> list[str]:
    """Names chosen by comma-separated names, patterns ("190923/*") or positions ("0", "3-7"); all for an empty choice.

    `what` says what they name.

    Raises:
        BadInputError: a part of the choice that matches nothing.
    """
    parts = [part.strip() for text in wanted for part in text.split(",") if part.strip()]
    if not parts:
        return list(names)
    chosen: dict[str, None] = {}
    for part in parts:
        found = _matches(names, part)
        if not found:
            some = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
            raise BadInputError(f"--neurons {part!r} matches none of the {len(names)} {what} ({some})")
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def _matches(names: Sequence[str], part: str) -> list[str]:
    if part in names:
        return [part]
    positions = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
    if positions:
        first = int(positions[1])
        last = int(positions[2] or first)
        return list(names[first : last + 1]) if last < len(names) else []
    return [name for name in names if fnmatch.fnmatchcase(name, part)]


@contextlib.contextmanager
def output_table(path: Path, columns: Sequence[str]) -> Iterator[io.TableWriter]:
    """`io.open_table` for a destination that the user gave; errors of computing within the block pass unchanged.

    Raises:
        BadInputError: an unsuitable name, a missing folder, no permission, no space left.
    """
    try:
        with contextlib.ExitStack() as stack:
            with bad_input():
                table = stack.enter_context(io.open_table(path, columns))
            yield table
    except OSError as error:
        raise BadInputError(sentence(error)) from error


def settle_threads(threads: int | None) -> int:
    """Set the number of threads if one is given; the number in force.

    Raises:
        BadInputError: less than 1.
    """
    if threads is not None:
        with bad_input():
            cl.set_num_threads(threads)
    return cl.get_num_threads()


def settle_device(bank: cl.ModelBank, device: str, *, backend: str, precision: str, dtype: str) -> cl.ModelBank:
    """The bank where it will run. "auto" is the first GPU if a GPU backend takes the bank there, else the processor.

    Raises:
        BadInputError: an unknown device, or one that is not there.
    """
    if device == "auto":
        if backend in ("cpu", "reference") or not torch.cuda.is_available():
            return bank
        gpu = torch.device("cuda", 0)
        kind = torch.uint8 if dtype == "uint8" else torch.float32
        shape = ops.bank_shape(bank.table)
        verdict = ops.explain(ops.Problem("bank_forward", "cuda", 0, kind, precision=precision, bank=shape))
        if verdict.chosen == "reference":
            reasons = "; ".join(f"{v.backend}: {v.reason}" for v in verdict.verdicts if v.reason)
            stderr().print(f"the GPU is not used ({escape(reasons)})", soft_wrap=True)
            return bank
        return bank.to(gpu)
    match = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", device)
    if match is None:
        raise BadInputError(f"--device should be auto, cpu, cuda or a numbered one such as cuda:1, got {device!r}")
    if device == "cpu":
        return bank
    count = torch.cuda.device_count()
    if int(match[1] or 0) >= count:
        there = ", ".join(f"cuda:{i}" for i in range(count)) or "no GPU"
        raise BadInputError(f"--device {device}: torch {torch.__version__} sees {there} here")
    return bank.to(torch.device("cuda", int(match[1] or 0)))


def where_it_runs(bank: cl.ModelBank, threads: int) -> str:
    """The GPU's product name, or the number of threads."""
    if bank.device.type == "cuda":
        return torch.cuda.get_device_name(bank.device)
    return f"{threads} thread{'' if threads == 1 else 's'}"


def settle_backend(
    bank: cl.ModelBank, *, backend: str, precision: str, op: str = "bank_forward", dtype: str = "uint8", batch: int = 1
) -> cl.Explanation:
    """Which backend will run, before any work is done.

    Raises:
        BadInputError: an unknown or unable backend, or an unknown precision.
    """
    if precision not in ("exact", "fast"):
        raise BadInputError(f"--precision should be exact or fast, got {precision!r}")
    try:
        with bad_input():
            verdict = cl.explain(op, bank, batch=batch, dtype=dtype, precision=precision, backend=backend)
    except cl.BackendError as error:
        raise BadInputError(sentence(error)) from error
    reason = verdict.reason(backend) if backend != "auto" else None
    if reason is not None:
        raise BadInputError(f"the {backend!r} backend cannot run this: {reason}")
    return verdict

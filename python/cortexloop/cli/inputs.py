"""Options that several commands have in common: which models, where to, how many threads, which backend."""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import cortexloop as cl
from cortexloop import io
from cortexloop.cli.console import BadInputError, bad_input, sentence


def load_bank(path: Path, neurons: Sequence[str] = ()) -> cl.ModelBank:
    """The models of a file or folder, or those of them that `neurons` chooses; only these are read.

    Raises:
        BadInputError: an unreadable source, or a choice that matches nothing.
    """
    with bad_input(), io.open_models(path) as files:
        chosen = choose(files.names, neurons)
        return cl.ModelBank.from_weights(files.read(name) for name in chosen)


def choose(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Names chosen by comma-separated names, patterns ("190923/*") or positions ("0", "3-7"); all for an empty choice.

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
            raise BadInputError(f"--neurons {part!r} matches none of the {len(names)} models ({some})")
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

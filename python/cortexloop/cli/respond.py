"""`cortexloop respond`: responses of models to images, streamed from file to file."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

import cortexloop as cl
from cortexloop import io
from cortexloop.cli.console import BadInputError, bad_input, guarded, print_json, progress, stderr, stdout
from cortexloop.cli.inputs import (
    load_bank,
    output_table,
    settle_backend,
    settle_device,
    settle_threads,
    where_it_runs,
)


@dataclass(frozen=True)
class RespondOptions:
    """See the options of the command."""

    models: Path
    images: Path
    out: Path
    neurons: tuple[str, ...] = ()
    batch: int = 64
    precision: str = "exact"
    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None
    layout: str = "NHWC"
    key: str | None = None
    recentred: bool = False
    resize: bool = False
    skip_bad: bool = False
    json: bool = False


def respond(options: RespondOptions) -> None:
    """Stream images through a bank into a table: at any time about four batches are in memory.

    A thread decodes the next batch while the models work on the last, which on a GPU overlaps with copying, too.

    Raises:
        BadInputError: models, images, options or destination that cannot be used.
    """
    if options.batch < 1:
        raise BadInputError(f"--batch should be at least 1, got {options.batch}")
    if options.out.exists() and any(_same(options.out, path) for path in (options.models, options.images)):
        raise BadInputError(f"--out {str(options.out)!r} would overwrite its own input; give another name")
    bank = load_bank(options.models, options.neurons)
    threads = settle_threads(options.threads)
    dtype = "float32" if options.recentred else "uint8"
    bank = settle_device(bank, options.device, backend=options.backend, precision=options.precision, dtype=dtype)
    verdict = settle_backend(
        bank, backend=options.backend, precision=options.precision, dtype=dtype, batch=options.batch
    )
    with bad_input():
        source = io.open_images(
            options.images,
            size=(bank.height, bank.width),
            resize=options.resize,
            recentred=options.recentred,
            key=options.key,
            layout=options.layout,
            on_error="skip" if options.skip_bad else "raise",
        )
    started = time.perf_counter()
    rows = _stream(options, bank, source)
    seconds = time.perf_counter() - started
    _summarise(options, bank, source, rows, seconds, verdict.chosen, threads)


def _stream(options: RespondOptions, bank: cl.ModelBank, source: io.ImageSource) -> int:
    read: deque[list[str]] = deque()  # names of the batches whose responses are not there yet

    def batches() -> Iterator[NDArray[Any]]:
        for names, pixels in guarded(source.batches(options.batch)):
            read.append(names)
            yield pixels

    with output_table(options.out, bank.names) as table, progress("images", len(source), quiet=options.json) as bar:
        for values in cl.stream_responses(batches(), bank, precision=options.precision, backend=options.backend):
            names = read.popleft()
            table.append(names, values)
            bar.advance(len(names))
    return table.rows


def _same(a: Path, b: Path) -> bool:
    return b.exists() and a.samefile(b)


def _summarise(
    options: RespondOptions,
    bank: cl.ModelBank,
    source: io.ImageSource,
    rows: int,
    seconds: float,
    backend: str,
    threads: int,
) -> None:
    if options.json:
        print_json(
            {
                "out": str(options.out),
                "images": rows,
                "models": len(bank),
                "seconds": seconds,
                "pairs_per_second": rows * len(bank) / seconds,
                "backend": backend,
                "device": str(bank.device),
                "precision": options.precision,
                "threads": threads,
                "skipped": [{"name": s.name, "reason": s.reason} for s in source.skipped],
            }
        )
        return
    if source.skipped:
        table = Table(
            "image", "why it was skipped", title=f"{len(source.skipped)} images skipped", title_justify="left"
        )
        for skipped in source.skipped:
            table.add_row(escape(skipped.name), escape(skipped.reason))
        stderr().print(table)
    where = escape(where_it_runs(bank, threads))
    stdout().print(
        f"[bold]{rows:,}[/] images x [bold]{len(bank):,}[/] models in {seconds:.1f} s "
        f"({rows * len(bank) / seconds:,.0f} pairs/s; {backend} backend on {where}, {options.precision})",
        soft_wrap=True,
    )
    stdout().print(f"written to [bold]{escape(str(options.out))}[/]", soft_wrap=True)

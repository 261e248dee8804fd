"""`cortexloop respond`: responses of models to images, streamed from file to file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

import cortexloop as cl
from cortexloop import io
from cortexloop.cli.console import BadInputError, bad_input, guarded, print_json, progress, stderr, stdout
from cortexloop.cli.inputs import load_bank, output_table, settle_backend, settle_threads


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
    threads: int | None = None
    layout: str = "NHWC"
    key: str | None = None
    recentred: bool = False
    resize: bool = False
    skip_bad: bool = False
    json: bool = False


def respond(options: RespondOptions) -> None:
    """Stream images through a bank into a table: at any time about three batches are in memory.

    Raises:
        BadInputError: models, images, options or destination that cannot be used.
    """
    if options.batch < 1:
        raise BadInputError(f"--batch should be at least 1, got {options.batch}")
    if options.out.exists() and any(_same(options.out, path) for path in (options.models, options.images)):
        raise BadInputError(f"--out {str(options.out)!r} would overwrite its own input; give another name")
    bank = load_bank(options.models, options.neurons)
    threads = settle_threads(options.threads)
    verdict = settle_backend(
        bank,
        backend=options.backend,
        precision=options.precision,
        dtype="float32" if options.recentred else "uint8",
        batch=options.batch,
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
    with output_table(options.out, bank.names) as table, progress("images", len(source), quiet=options.json) as bar:
        for names, pixels in guarded(source.batches(options.batch)):
            table.append(names, cl.responses(pixels, bank, precision=options.precision, backend=options.backend))
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
    stdout().print(
        f"[bold]{rows:,}[/] images x [bold]{len(bank):,}[/] models in {seconds:.1f} s "
        f"({rows * len(bank) / seconds:,.0f} pairs/s; {backend} backend, {options.precision}, {threads} threads)",
        soft_wrap=True,
    )
    stdout().print(f"written to [bold]{escape(str(options.out))}[/]", soft_wrap=True)

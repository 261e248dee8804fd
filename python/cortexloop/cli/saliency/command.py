"""`cortexloop saliency`: heat maps of what drives model neurons, or of what pairs of images share for them."""

from __future__ import annotations

import datetime
import json
import time
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

import cortexloop as cl
from cortexloop.cli import machine
from cortexloop.cli.console import print_json, progress, stderr, stdout
from cortexloop.cli.evolution.store import plain
from cortexloop.cli.folder import OutputFolder
from cortexloop.cli.inputs import settle_threads
from cortexloop.cli.saliency.files import MAPS, OVERLAYS, write_files
from cortexloop.cli.saliency.findings import SaliencyFindings
from cortexloop.cli.saliency.options import SaliencyOptions, check

REPORT, RUN = "report.html", "run.json"


def saliency_command(options: SaliencyOptions) -> None:
    """Make the maps and write them into the folder `options.out`.

    Raises:
        BadInputError: models, images, options or a folder that cannot be used.
    """
    from cortexloop.cli.saliency.report import render

    started = time.perf_counter()
    check(options)
    folder = OutputFolder(options.out, (REPORT, RUN, MAPS, OVERLAYS), overwrite=options.overwrite)
    settle_threads(options.threads)
    record = _record(options)
    if options.model is None:
        from cortexloop.cli.saliency.bank import explain_bank

        findings = explain_bank(options, record)
    else:
        from cortexloop.cli.saliency.pairs import explain_pairs

        findings = explain_pairs(options, record)
    with progress("writing maps and report", 1, quiet=options.json) as bar, folder.writing() as place:
        write_files(findings, place)
        record["seconds"] = time.perf_counter() - started
        (place / REPORT).write_text(render(findings), encoding="utf-8")
        (place / RUN).write_text(json.dumps(plain(record), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        bar.advance()
    _summarise(findings)


def _record(options: SaliencyOptions) -> dict[str, Any]:
    state = machine.kernels()
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "options": options.stored(),
        "source": options.source.stored(),
        "machine": {"processor": machine.processor(), "isa": state["isa"], "threads": cl.get_num_threads()},
        "versions": {"cortexloop": cl.__version__, "torch": torch.__version__, "numpy": machine.version_of("numpy")},
    }


def _summarise(findings: SaliencyFindings) -> None:
    report = str(findings.out / REPORT)
    if findings.options.json:
        print_json(
            {
                "out": str(findings.out),
                "report": report,
                "seconds": findings.record["seconds"],
                "method": findings.label,
                "images": findings.images,
                "gallery": findings.gallery,
                "neurons": [
                    {
                        "name": neuron.name,
                        "images": [{"name": one.name, "response": one.response} for one in neuron.explained],
                        "comparisons": [
                            {
                                "image": one.name,
                                "response": one.response,
                                "references": [
                                    {"name": p.reference.name, "similarity": p.similarity} for p in one.pairs
                                ],
                            }
                            for one in neuron.comparisons
                        ],
                    }
                    for neuron in findings.neurons
                ],
                "skipped": [{"name": one.name, "reason": one.reason} for one in findings.skipped],
                "notes": list(findings.notes),
            }
        )
        return
    for note in findings.notes:
        stderr().print(f"[yellow]note:[/] {escape(note)}", soft_wrap=True)
    for one in findings.skipped:
        stderr().print(f"[yellow]skipped:[/] {escape(one.name)}: {escape(one.reason)}", soft_wrap=True)
    pairs = findings.gallery is not None
    table = Table("neuron", title=f"{findings.label}, {findings.images:,} images", title_justify="left")
    for heading in ("image", "response", *(("best reference", "similarity") if pairs else ())):
        table.add_column(heading, justify="left" if heading in ("image", "best reference") else "right")
    for neuron in findings.neurons[:24]:
        if neuron.comparisons:
            first = max(neuron.comparisons, key=lambda one: one.response)
            best = first.pairs[0]
            more = [escape(best.reference.name), f"{best.similarity:.3g}"]
            table.add_row(escape(neuron.name), escape(first.name), f"{first.response:.2f}", *more)
        elif neuron.explained:
            top = neuron.explained[0]
            table.add_row(escape(neuron.name), escape(top.name), f"{top.response:.2f}")
    console = stdout()
    console.print(table)
    if len(findings.neurons) > 24:
        console.print(f"... and {len(findings.neurons) - 24} more neurons")
    console.print(
        f"report: [bold]{escape(report)}[/] ({findings.record['seconds']:.0f} s); maps as numbers: maps.npz",
        soft_wrap=True,
    )

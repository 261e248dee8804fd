"""`cortexloop doctor`: what is installed, what runs where, and why (not)."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from cortexloop.cli.console import print_json, stdout
from cortexloop.cli.machine import VARIABLES, facts


def doctor(*, json: bool = False) -> None:
    """Print the state of the installation."""
    found = facts()
    if json:
        print_json(found)
        return
    for title, rows in _sections(found):
        table = Table(
            box=None, show_header=False, title=title, title_justify="left", title_style="bold", pad_edge=False
        )
        table.add_column(min_width=20, no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in rows:
            table.add_row(f"  {escape(name)}", text)
        stdout().print(table)
        stdout().print()


def _sections(found: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    kernels = found["kernels"]
    if kernels["reason"] is None:
        others = ", ".join(kernels["isas"])
        isa = f"{kernels['isa']} (available: {others}; CORTEXLOOP_ISA forces one)"
        fast = "supported" if kernels["fast"] else "not on this instruction set: runs exactly"
    else:
        isa = fast = f"[yellow]no C++ kernels[/]: {escape(kernels['reason'])}"
    versions = [
        ("cortexloop", f"{found['cortexloop']}  [dim]{escape(found['location'])}[/]"),
        ("python", found["python"]),
    ]
    versions += [(name, version or "[red]missing[/]") for name, version in found["packages"].items()]
    extras = [
        (name, extra["version"] or f"[dim]absent; only for {escape(extra['purpose'])}[/]")
        for name, extra in found["optional"].items()
    ]
    backends = [
        (f"{op}, {where}", text)
        for where, key in (("processor", "backends"), ("GPU", "backends_on_a_gpu"))
        if where == "processor" or found["gpu"]["devices"]
        for op, verdicts in found[key].items()
        for text in map(_verdict, verdicts)
    ]
    return [
        ("Versions", versions),
        (
            "Machine",
            [
                ("system", escape(found["system"])),
                ("processor", escape(found["processor"])),
                ("processors", str(found["processors"])),
                ("threads", str(found["threads"])),
                ("instruction set", isa),
                ('precision "fast"', fast),
            ],
        ),
        ("GPU", _gpu(found["gpu"])),
        ("Backends", backends),
        ("Optional packages", extras),
        (
            "Environment",
            [
                (name, escape(value) if value else f"[dim]not set ({VARIABLES[name]})[/]")
                for name, value in found["variables"].items()
            ],
        ),
    ]


def _gpu(found: dict[str, Any]) -> list[tuple[str, str]]:
    devices = [
        (
            device["device"],
            f"{escape(device['name'])}, compute capability {device['capability']}, {device['memory'] / 2**30:.0f} GiB"
            + (f" [yellow](no CUDA kernels: {escape(device['unsupported'])})[/]" if device["unsupported"] else ""),
        )
        for device in found["devices"]
    ]
    reason = found["reason"]
    return [
        *(devices or [("devices", "none that torch can see")]),
        ("torch's CUDA", found["torch_cuda"] or "none: this torch was built without"),
        ("CUDA kernels", "built" if reason is None else f"[yellow]cannot run[/]: {escape(reason)}"),
        ("triton", found["triton"] or "absent; runs the models on GPUs where the CUDA kernels were not built"),
    ]


def _verdict(verdict: dict[str, Any]) -> str:
    detail = verdict["reason"] or verdict["note"]
    if verdict["chosen"]:
        state = "[green]runs[/]"
    elif verdict["reason"] is None:
        state = "could run"
    else:
        state = "[yellow]cannot run[/]"
    return f"{verdict['backend']}: {state}{f' ({escape(detail)})' if detail else ''}"

"""The README's section on GPUs, from recorded rows only, and what was aimed at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tables import Recorded, Target, number, select, table

OP, MOMENTS_OP = "bank on a GPU", "moments on a GPU"
BYTES_FLOOR = "floor, one pass over memory"
NOTHING = (
    "The GPU kernels have not run on hardware yet, so there are no figures of a GPU;\n"
    "[docs/gpu.md](docs/gpu.md) says what was verified without one.\n"
)
EXACT, FAST = "cortexloop cuda, exact", "cortexloop cuda, fast"
PERCENTILES = ("p50", "p99", "p99.9", "max")


def _names(rows: Iterable[Recorded]) -> list[str]:
    return list(dict.fromkeys(row["backend"] for row in rows))


def _value(rows: Sequence[Recorded], **wanted: str) -> float | None:
    found = select(rows, **wanted)
    return float(found[-1]["q50"]) if found else None


def _ours(name: str) -> str:
    return f"**{name}**" if name.startswith("cortexloop") else name


def _baseline(name: str) -> str:
    """Which of ours a peer is compared with: fp32 with exact, reduced precision with fast."""
    return EXACT if name.endswith("fp32") else FAST


def _times_longer(rows: Sequence[Recorded], name: str) -> str:
    """How many times longer than ours at the same precision, both timed in the same rounds."""
    peer, own = (select(rows, backend=n, metric="time") for n in (name, _baseline(name)))
    if name.startswith("cortexloop") or not peer or not own:
        return ""
    return f"{number(str(float(peer[-1]['ratio']) / float(own[-1]['ratio'])))}x"


def latency(rows: Sequence[Recorded]) -> list[str]:
    """Engines down, percentiles across."""
    lines = []
    for name in _names(rows):
        cells = [number(row["q50"]) for p in PERCENTILES for row in select(rows, backend=name, metric=p)[-1:]]
        peer, own = _value(rows, backend=name, metric="p50"), _value(rows, backend=_baseline(name), metric="p50")
        ratio = "" if name.startswith("cortexloop") or not peer or not own else f"{number(str(peer / own))}x"
        calls = select(rows, backend=name)[-1]["rounds"]
        lines.append([_ours(name), *cells, f"{int(calls):,}", ratio])
    return table(["microseconds", *PERCENTILES, "calls", "median, compared"], lines)


def throughput(rows: Sequence[Recorded]) -> list[str]:
    """Engines down, batches across: microseconds per pair, and the floor's share of it."""
    batches = sorted({int(row["batch"]) for row in rows})
    lines = []
    for name in _names(select(rows, metric="time")):
        cells = []
        for batch in batches:
            own = _value(rows, backend=name, metric="time", batch=str(batch))
            floor = _value(rows, metric="floor", batch=str(batch))
            cells.append("" if own is None else f"{number(str(own))} ({100 * (floor or 0) / own:.0f} %)")
        lines.append([_ours(name), *cells])
    titles = [f"{batch:,} image{'s' if batch > 1 else ''}" for batch in batches]
    return table(["microseconds per pair (share of the floor)", *titles], lines)


def comparison(rows: Sequence[Recorded]) -> list[str]:
    """Ours and peers of one precision, timed in the same rounds."""
    lines = [
        [_ours(name), number(str(_value(rows, backend=name))), _times_longer(rows, name)]
        for name in _names(select(rows, metric="time"))
    ]
    return table([f"{int(rows[0]['batch']):,} images", "microseconds per pair", "time, compared"], lines)


def gradients(rows: Sequence[Recorded]) -> list[str]:
    """Ours, autograd, and the forward pass alone."""
    timed = select(rows, metric="time")
    lines = []
    for name in _names(timed):
        ratio = select(timed, backend=name)[-1]["ratio"]
        first = timed[0]["backend"]
        against = "" if name == first else f"{number(ratio)}x"
        lines.append([_ours(name), number(str(_value(timed, backend=name))), against])
    return table(
        ["responses and input gradient", "microseconds per pair", f"time, compared with {timed[0]['backend']}"], lines
    )


def stream(rows: Sequence[Recorded]) -> list[str]:
    """Images from host memory, responses back to it."""
    lines = []
    for name in _names(rows):
        here = select(rows, backend=name)
        seconds = next(row for row in here if row["unit"] == "s")
        lines.append([_ours(name), number(str(_value(here, metric="time"))), f"{number(seconds['q50'])} s"])
    return table(["host to host", "microseconds per pair", f"{seconds['metric']} at this rate"], lines)


def accuracy(rows: Sequence[Recorded]) -> list[str]:
    """Error against float64."""
    kinds = ("quantiles over models", "worst model")
    metrics = [f"{metric}, {kind}" for metric in ("largest error", "1 - Pearson r") for kind in kinds]
    lines = [
        [name, *["" if (v := _value(rows, backend=name, metric=m)) is None else number(str(v)) for m in metrics]]
        for name in _names(rows)
    ]
    return table(
        [
            "compared with float64",
            "largest error (SD), median model",
            "worst model",
            "1 - r, median model",
            "worst model",
        ],
        lines,
    )


def moments(rows: Sequence[Recorded]) -> list[str]:
    """Engines and floors down, batches across: microseconds per batch, as multiples of one pass over memory."""
    batches = sorted({int(row["batch"]) for row in rows})
    lines = []
    for name in _names(row for row in rows if row["metric"] in ("time", "floor")):
        cells = []
        for batch in batches:
            found = [row for row in select(rows, backend=name, batch=str(batch)) if row["unit"] == "us"]
            ratio = f" ({number(found[-1]['ratio'])}x)" if found and found[-1]["ratio"] else ""
            cells.append(f"{number(found[-1]['q50'])}{ratio}" if found else "")
        lines.append([_ours(name), *cells])
    return table(["microseconds per batch (over memory)", *(f"{n:,} images" for n in batches)], lines)


def report(rows: Sequence[Recorded]) -> str:
    """The text between the README's markers for GPUs."""
    of_moments, rows = select(rows, op=MOMENTS_OP), select(rows, op=OP)
    if not rows:
        return NOTHING
    out: list[str] = []
    for machine in dict.fromkeys(row["machine"] for row in rows):
        here = select(rows, machine=machine)
        last = here[-1]
        ceilings = {row["backend"]: row for row in select(here, direction="ceiling")}
        half, copy = ceilings.get("torch, float16"), ceilings.get("torch")
        out += [
            f"Measured on {last['cpu_or_gpu']} (driver {last['driver']}, torch {last['torch'].split('+')[0]}), "
            "medians of interleaved rounds between events.",
            "A pair is one model on one 112 x 112 image. Peers: fp32 compared with exact, tf32 and fp16 with fast.",
        ]
        if half and copy:
            out.append(
                "The floor is the operations of direct convolutions at the rate of float16 products seen on this GPU, "
                f"{number(half['q50'])} TFLOP/s (its memory copied {number(copy['q50'])} TB/s)."
            )
        out.append("")
        forward = select(here, direction="forward")
        compared = [row for row in forward if row["case"].endswith("peers")]
        alone = [row for row in forward if row not in compared and row["metric"] in ("time", "floor")]
        errors = [row for row in forward if row["metric"].startswith(("largest", "1 -"))]
        sections: list[tuple[str, list[Recorded], Callable[[Sequence[Recorded]], list[str]]]] = [
            ("Latency: one image, host to host", select(here, direction="latency, host to host"), latency),
            ("Throughput, images on the GPU", alone, throughput),
            ("Image i with model i: input gradients", select(here, direction="gradient of pairs"), gradients),
            ("A stream of images", select(here, direction="stream, host to host"), stream),
            *(
                ("Against torch", select(compared, case=case), comparison)
                for case in dict.fromkeys(row["case"] for row in compared)
            ),
            ("Accuracy", errors, accuracy),
            *(
                ("Streaming moments of features and responses", select(found, case=case), moments)
                for found in [select(of_moments, machine=machine)]
                for case in dict.fromkeys(row["case"] for row in found)
            ),
        ]
        for title, found, make in sections:
            if found:
                out += [f"**{title}, {found[0]['case']}**", "", *make(found), ""]
    return "\n".join(out).rstrip("\n") + "\n"


# --- targets ------------------------------------------------------------------------------------------------------


def _per_pair(name: str) -> Callable[[Sequence[Recorded]], float | None]:
    """The best throughput of any batch."""

    def measured(rows: Sequence[Recorded]) -> float | None:
        found = [
            float(row["q50"])
            for row in select(rows, op=OP, direction="forward", backend=name, metric="time")
            if not row["case"].endswith("peers")
        ]
        return min(found, default=None)

    return measured


def _against(peer: str, own: str) -> Callable[[Sequence[Recorded]], float | None]:
    """How many times longer a peer takes, in the rounds that they shared."""

    def measured(rows: Sequence[Recorded]) -> float | None:
        for row in select(rows, op=OP, direction="forward", backend=peer, metric="time"):
            same = select(rows, op=OP, direction="forward", backend=own, metric="time", case=row["case"])
            if same:
                return float(row["ratio"]) / float(same[-1]["ratio"])
        return None

    return measured


def _latency(name: str, metric: str) -> Callable[[Sequence[Recorded]], float | None]:
    return lambda rows: _value(rows, op=OP, direction="latency, host to host", backend=name, metric=metric)


def _graph_latency(rows: Sequence[Recorded]) -> float | None:
    slow, fast = _latency("torch, CUDA graph, fp16", "p50")(rows), _latency(FAST, "p50")(rows)
    return slow / fast if slow and fast else None


def _gradient_over_forward(rows: Sequence[Recorded]) -> float | None:
    found = select(rows, op=OP, direction="gradient of pairs", backend=f"{EXACT}, responses alone", metric="time")
    return 1 / float(found[-1]["ratio"]) if found else None


def _moments(rows: Sequence[Recorded]) -> float | None:
    """Time over that of one pass over memory, for the largest batch of float32 features."""
    found = select(rows, op=MOMENTS_OP, backend="cortexloop cuda", metric="time")
    largest = max((row for row in found if "float32" in row["case"]), key=lambda row: int(row["batch"]), default=None)
    return float(largest["ratio"]) if largest else None


def targets() -> list[Target]:
    """The targets for one GPU."""
    aims = [
        Target("fast, microseconds per pair", _per_pair(FAST), at_most=0.4),
        Target("exact, microseconds per pair", _per_pair(EXACT), at_most=0.8),
        Target("latency of one image, p50 in microseconds", _latency(FAST, "p50"), at_most=150),
        Target("latency of one image, p99 in microseconds", _latency(FAST, "p99"), at_most=300),
        Target("latency against a CUDA graph of torch networks, fp16", _graph_latency, at_least=20),
        Target("gradient over forward", _gradient_over_forward, at_most=2.5),
    ]
    for kind in ("fp32", "tf32", "fp16"):
        own = _baseline(kind)
        aims.append(Target(f"against torch eager, {kind}", _against(f"torch eager, {kind}", own), at_least=15))
        aims.append(Target(f"against torch.compile, {kind}", _against(f"torch.compile, {kind}", own), at_least=8))

    def seconds(rows: Sequence[Recorded]) -> float | None:
        return _value(rows, op=OP, direction="stream, host to host", backend=FAST, unit="s")

    def correlation(kind: str) -> Callable[[Sequence[Recorded]], float | None]:
        return lambda rows: _value(rows, op=OP, backend=FAST, metric=f"1 - Pearson r, {kind}")

    return [
        *aims,
        Target("500,000 images through all models, seconds", seconds, at_most=45),
        Target("moments of large batches, time over one pass over memory", _moments, at_most=1.5),
        Target("fast, 1 - r of the median model", correlation("quantiles over models"), at_most=1e-5),
        Target("fast, 1 - r of the worst model", correlation("worst model"), at_most=1e-4),
    ]

"""The bank of compact models on a GPU against torch: latency, throughput, gradients, a streamed image bank, accuracy;
and streaming moments (gpu_moments.py).

    python benchmarks/bench_gpu.py [--out FOLDER] [--only latency,throughput,...] [--budget 240] [--commit HASH]

Parts run in order of importance, each within its share of the time, and their rows are written as soon as they are
there. Before any clock starts, every contender's result is compared with float64 networks: a contender that is wrong
gets no number, and if it is ours, the part fails. `--rehearse` runs every line on small cases, on a CPU too.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import cortexloop as cl
import gpu_peers as peers
import report_gpu
from cases import Case, all_models, one_model, random_images, random_model
from cortexloop.models import CompactModel
from gpu_measure import (
    Ceilings,
    GpuContender,
    Provenance,
    ceilings,
    latencies,
    measure,
    precision,
    slug,
    synchronize,
)
from gpu_moments import part_moments
from record import RESULTS, Row, append, quantiles

# Largest error that still counts as the same network, in standard deviations of each model's responses over images.
LIMIT, REDUCED_LIMIT = 1e-3, 0.25
GRADIENT_LIMIT = 5e-3  # relative L2; a single ReLU gate that rounds to the other side costs up to this much
SCREENING = 500_000  # images of the estimate
FLOOR = "floor, float16 products"


class WrongResultError(Exception):
    """A result of ours disagrees with float64; no time is worth reporting."""


@dataclass(frozen=True)
class Setup:
    """What the parts need.

    Attributes:
        case: all models, on as many images as the gate looks at.
        answers: float64 responses of `case`, from readable networks that never saw packed weights.
        single: one model of median work.
        engines: backends of ours that run here.
        rehearsal: small, for finding mistakes.
    """

    device: torch.device
    case: Case
    answers: NDArray[np.float64]
    single: Case
    engines: tuple[str, ...]
    provenance: Provenance
    ceilings: Ceilings
    rehearsal: bool

    def sets(self, batch: int) -> int:
        """How many input sets it takes to be larger than the L2 cache (twice 60 MB), within 1 GB."""
        size = batch * 3 * self.case.images.shape[1] * self.case.images.shape[2]
        return 2 if self.rehearsal else int(np.clip(120e6 // size, 2, 8))

    def expected(self, batch: int) -> NDArray[np.float64]:
        """float64 responses of `case.with_batch(batch)`."""
        return np.resize(self.answers, (batch, len(self.case.models)))

    @property
    def spread(self) -> NDArray[np.float64]:
        """[N] standard deviation of each model's responses over images."""
        return self.answers.std(axis=0)


def rehearsal_case(count: int) -> Case:
    rng = np.random.default_rng(0)
    models = tuple(random_model(f"m{i}", (5, 4, 3, 3, 3), rng, size=24) for i in range(count))
    return Case("rehearsal", models, random_images(4, rng, size=24))


def engines(device: torch.device) -> tuple[str, ...]:
    """Ours that run on this device, fastest first."""
    if device.type != "cuda":
        return ("reference",)
    explanation = cl.explain(device=device)
    return tuple(name for name in ("cuda", "triton") if explanation.reason(name) is None)


# --- ours ---------------------------------------------------------------------------------------------------------


def label(engine: str, kind: str) -> str:
    return f"cortexloop {engine}, {kind}"


def pixel_sets(case: Case, device: torch.device, sets: int) -> list[torch.Tensor]:
    images = torch.from_numpy(case.images).to(device)
    return [images.roll(i, dims=0).contiguous() for i in range(sets)]


def ours(setup: Setup, case: Case, bank: cl.ModelBank, engine: str, kind: str) -> GpuContender:
    """`cl.responses` on uint8 images that are on the device: checks and recentring are inside the clock."""
    sets = setup.sets(case.batch)
    images = pixel_sets(case, setup.device, sets)

    def run(i: int) -> torch.Tensor:
        return cl.responses(images[i % sets], bank, precision=kind, backend=engine)

    return GpuContender(
        label(engine, kind),
        run,
        lambda: run(0).double().cpu().numpy(),
        reduced=kind == "fast" and engine != "reference",
    )


# --- the gate -----------------------------------------------------------------------------------------------------


def networks64(case: Case, device: torch.device) -> Iterator[torch.nn.Module]:
    for model in case.models:
        yield CompactModel.from_weights(model).double().eval().requires_grad_(False).to(device)


def reference(case: Case, device: torch.device) -> NDArray[np.float64]:
    """float64 responses [B, N] of readable networks."""
    images = torch.from_numpy(case.images.astype(np.float64) - case.models[0].image_mean).to(device)
    with torch.inference_mode():
        columns = [torch.cat([net(part) for part in images.split(16)]) for net in networks64(case, device)]
    return torch.stack(columns, dim=1).cpu().numpy()


def right(
    contenders: Sequence[GpuContender], expected: NDArray[np.float64], spread: NDArray[np.float64]
) -> list[GpuContender]:
    """Those contenders whose responses are right.

    Raises:
        WrongResultError: one of ours is not.
    """
    passed = []
    for contender in contenders:
        contender.prepare()
        error = float(np.max(np.abs(contender.fetch() - expected) / spread))
        limit = REDUCED_LIMIT if contender.reduced else LIMIT
        if error <= limit:
            passed.append(contender)
            continue
        sentence = f"{contender.name}: largest error is {error:.3g} standard deviations, at most {limit:g} is right"
        if contender.name.startswith("cortexloop"):
            raise WrongResultError(sentence)
        print(f"no number for {sentence}", flush=True)
    return passed


def attempt(make: Callable[..., GpuContender], *arguments: Any, **options: Any) -> list[GpuContender]:
    """A peer, or nothing if it cannot be made here (out of memory, an unsupported type); said aloud."""
    try:
        contender = make(*arguments, **options)
        contender.prepare()
        contender.run(0)
    except (RuntimeError, ValueError) as error:
        print(f"no number for {make.__name__}: {str(error).splitlines()[0]}", flush=True)
        return []
    return [contender]


# --- the parts: each yields rows as soon as it has them -----------------------------------------------------------


def part_latency(setup: Setup, budget: float) -> Iterator[list[Row]]:
    """One image, all models, host to host: each call by itself, with all of its distribution."""
    case = setup.case.with_batch(1)
    expected = setup.expected(1)
    bank = cl.ModelBank.from_weights(case.models).to(setup.device)

    def rows_of(name: str, seconds: NDArray[np.float64]) -> list[Row]:
        values = {"p50": 50, "p99": 99, "p99.9": 99.9, "max": 100}
        return [
            setup.provenance.row(
                case=case.name, batch=1, direction="latency, host to host", backend=name, metric=metric, unit="us",
                q50=float(np.percentile(seconds, percent)) * 1e6, rounds=len(seconds),
            )
            for metric, percent in values.items()
        ]  # fmt: skip

    def check(name: str, got: NDArray[np.floating], reduced: bool) -> bool:
        error = float(np.max(np.abs(got - expected) / setup.spread))
        if error <= (REDUCED_LIMIT if reduced else LIMIT):
            return True
        if name.startswith("cortexloop"):
            raise WrongResultError(f"{name}: largest error is {error:.3g} standard deviations")
        print(f"no number for {name}: largest error is {error:.3g} standard deviations", flush=True)
        return False

    for engine in setup.engines:
        first = engine == setup.engines[0]
        count = 30 if setup.rehearsal else 100_000 if first else 5_000
        for kind in ("exact", "fast"):
            plan = cl.Plan(bank, 1, precision=kind, backend=engine)
            plan.images[:] = case.images
            check(label(engine, kind), plan.run(), reduced=kind == "fast")
            yield rows_of(
                label(engine, kind), latencies(plan.run, count=count, budget=budget * (0.35 if first else 0.05))
            )
    for kind in peers.KINDS:
        try:
            run = peers.captured_latency(case, kind, setup.device)
            good = check(f"torch, CUDA graph, {kind}", run().double().numpy(), reduced=kind != "fp32")
        except RuntimeError as error:
            print(f"no number for torch, CUDA graph, {kind}: {str(error).splitlines()[0]}", flush=True)
            continue
        if good:
            count = 30 if setup.rehearsal else 1_000
            yield rows_of(f"torch, CUDA graph, {kind}", latencies(run, count=count, budget=budget * 0.06))


def part_throughput(setup: Setup, budget: float) -> Iterator[list[Row]]:
    """All models on 64, 512 and 4096 images that are on the device, ours alone."""
    bank = cl.ModelBank.from_weights(setup.case.models).to(setup.device)
    batches = (2, 4) if setup.rehearsal else (64, 512, 4096)
    for batch in batches:
        case, first = setup.case.with_batch(batch), batch == batches[0]
        names = setup.engines if first else setup.engines[:1]
        contenders = [ours(setup, case, bank, engine, kind) for engine in names for kind in ("exact", "fast")]
        if first:
            right(contenders, setup.expected(batch), setup.spread)
        times = measure(contenders, setup.device, budget=budget / len(batches), min_rounds=3)
        rows = setup.provenance.timed(times, case=case.name, batch=batch, direction="forward", pairs=case.evaluations)
        yield [*rows, floor(setup, batch, "forward")]


def floor(setup: Setup, batch: int, direction: str, passes: int = 1) -> Row:
    """The operations of direct convolutions at the rate of float16 products that this GPU was seen to reach."""
    seconds = passes * setup.case.flop / setup.case.evaluations / setup.ceilings.half
    return setup.provenance.row(
        case=setup.case.name, batch=batch, direction=direction, backend=FLOOR, metric="floor", unit="us/pair",
        q50=seconds * 1e6,
    )  # fmt: skip


def part_peers(setup: Setup, budget: float) -> Iterator[list[Row]]:
    """All models on 64 images: ours, loops over torch networks, a captured loop, grouped convolutions."""
    case = setup.case.with_batch(4 if setup.rehearsal else 64)
    bank = cl.ModelBank.from_weights(case.models).to(setup.device)
    expected, sets = setup.expected(case.batch), setup.sets(case.batch)
    candidates = [ours(setup, case, bank, setup.engines[0], kind) for kind in ("exact", "fast")]
    for kind in peers.KINDS:
        contenders = list(candidates)
        for make in (peers.eager, peers.captured, peers.grouped):
            contenders += attempt(make, case, kind, setup.device, sets)
        passed = right(contenders, expected, setup.spread)
        times = measure(passed, setup.device, budget=budget / len(peers.KINDS), min_rounds=3, max_rounds=15)
        del contenders, passed
        yield setup.provenance.timed(
            times, case=f"{case.name}, {kind} peers", batch=case.batch, direction="forward", pairs=case.evaluations
        )
        _free(setup)


def part_gradient(setup: Setup, budget: float) -> Iterator[list[Row]]:
    """Image i with model i modulo N: responses, and responses with input gradients; against autograd."""
    batch = 2 * len(setup.case.models) if setup.rehearsal else 1024
    case = setup.case.with_batch(batch)
    n = len(case.models)
    bank = cl.ModelBank.from_weights(case.models).to(setup.device)
    pairs = torch.arange(batch, device=setup.device) % n
    sets = setup.sets(4 * batch)
    images = [torch.from_numpy(case.recentred()).to(setup.device).roll(i, dims=0).contiguous() for i in range(sets)]
    ones = torch.ones(batch, device=setup.device)

    def forward(engine: str) -> GpuContender:
        def run(i: int) -> torch.Tensor:
            return cl.responses(images[i % sets], bank, pairs=pairs, backend=engine)

        return GpuContender(f"{label(engine, 'exact')}, responses alone", run, lambda: np.empty(0))

    def gradient(engine: str) -> GpuContender:
        def run(i: int) -> torch.Tensor:
            return cl.input_gradient(images[i % sets], bank, ones, pairs=pairs, backend=engine)

        return GpuContender(label(engine, "exact"), run, lambda: run(0).double().cpu().numpy())

    expected = np.zeros(case.images.shape)
    for k, net in enumerate(networks64(case, setup.device)):
        leaf = images[0][k::n].double().requires_grad_()
        expected[k::n] = torch.autograd.grad(net(leaf).sum(), leaf)[0].cpu().numpy()
    contenders = [gradient(engine) for engine in setup.engines]
    for kind in ("fp32", "tf32"):
        contenders += attempt(peers.eager_gradient_of_pairs, case, kind, setup.device, sets)
    passed = []
    for contender in contenders:
        contender.prepare()
        error = float(np.linalg.norm(contender.fetch() - expected) / np.linalg.norm(expected))
        if error <= (REDUCED_LIMIT if contender.reduced else GRADIENT_LIMIT):
            passed.append(contender)
        elif contender.name.startswith("cortexloop"):
            raise WrongResultError(f"{contender.name}: relative L2 error of the gradient is {error:.3g}")
        else:
            print(f"no number for {contender.name}: relative L2 error of the gradient is {error:.3g}", flush=True)
    passed += [forward(engine) for engine in setup.engines]
    times = measure(passed, setup.device, budget=budget, min_rounds=3)
    rows = setup.provenance.timed(times, case=case.name, batch=batch, direction="gradient of pairs", pairs=batch)
    yield [*rows, floor(setup, batch, "gradient of pairs", passes=2)]


def part_stream(setup: Setup, budget: float) -> Iterator[list[Row]]:
    """Images from host memory through all models and the responses back, for as long as the budget allows."""
    bank = cl.ModelBank.from_weights(setup.case.models).to(setup.device)
    batch = 4 if setup.rehearsal else 512
    source = [setup.case.with_batch(batch).images[::-1].copy() for _ in range(2 if setup.rehearsal else 8)]
    for kind in ("fast", "exact"):

        def images(limit: float) -> Iterator[NDArray[np.uint8]]:
            deadline, i = time.perf_counter() + limit, 0
            while i < 3 or time.perf_counter() < deadline:
                yield source[i % len(source)]
                i += 1

        options = {"precision": kind, "backend": setup.engines[0]}
        for _ in cl.stream_responses(images(0.0), bank, **options):
            pass
        start, seen = time.perf_counter(), 0
        for responses in cl.stream_responses(images(budget / 2.5), bank, **options):
            seen += len(responses)
        seconds = time.perf_counter() - start
        per_pair = seconds / (seen * len(bank))
        name = label(setup.engines[0], kind)
        common = {"case": setup.case.name, "batch": batch, "direction": "stream, host to host", "backend": name}
        yield [
            setup.provenance.row(**common, metric="time", unit="us/pair", q50=per_pair * 1e6, rounds=seen // batch),
            setup.provenance.row(
                **common, metric=f"{SCREENING:,} images", unit="s", q50=per_pair * SCREENING * len(bank)
            ),
        ]


def part_accuracy(setup: Setup, budget: float) -> Iterator[list[Row]]:
    """Error against float64 over models: largest error in SDs, and 1 - Pearson r over images."""
    bank = cl.ModelBank.from_weights(setup.case.models).to(setup.device)
    expected = setup.answers
    wanted = expected - expected.mean(axis=0)
    rows = []
    for engine in setup.engines:
        for kind in ("exact", "fast"):
            got = ours(setup, setup.case, bank, engine, kind).fetch()
            centred = got - got.mean(axis=0)
            r = (centred * wanted).sum(axis=0) / np.sqrt((centred**2).sum(axis=0) * (wanted**2).sum(axis=0))
            errors = np.abs(got - expected).max(axis=0) / setup.spread
            for metric, unit, values in (("largest error", "SD", errors), ("1 - Pearson r", "1", 1 - r)):
                common = {
                    "case": setup.case.name, "batch": setup.case.batch, "direction": "forward",
                    "backend": label(engine, kind), "unit": unit,
                }  # fmt: skip
                q50, q20, q80 = quantiles(values)
                rows.append(
                    setup.provenance.row(
                        **common,
                        metric=f"{metric}, quantiles over models",
                        q50=q50,
                        q20=q20,
                        q80=q80,
                        rounds=len(values),
                    )
                )
                rows.append(setup.provenance.row(**common, metric=f"{metric}, worst model", q50=float(values.max())))
    yield rows


def part_compile(setup: Setup, budget: float) -> Iterator[list[Row]]:
    """One model on 512 images: ours against torch.compile with max-autotune, whose compiling takes most of the time."""
    case = setup.single.with_batch(4 if setup.rehearsal else 512)
    bank = cl.ModelBank.from_weights(case.models).to(setup.device)
    expected, sets = reference(case, setup.device), setup.sets(case.batch)
    candidates = [ours(setup, case, bank, setup.engines[0], kind) for kind in ("exact", "fast")]
    mode = "default" if setup.rehearsal else "max-autotune"
    deadline = time.perf_counter() + budget
    for kind in ("fp16", "tf32", "fp32"):
        if time.perf_counter() > deadline:
            print(f"no time is left to compile the {kind} network", flush=True)
            return
        precision(kind)
        compiled = attempt(peers.compiled, case, kind, setup.device, sets, mode=mode)
        passed = right([*candidates, *compiled], expected, expected.std(axis=0))
        times = measure(passed, setup.device, budget=budget / 12, min_rounds=3)
        yield setup.provenance.timed(
            times, case=f"{case.name}, {kind} peers", batch=case.batch, direction="forward", pairs=case.evaluations
        )
        _free(setup)


def part_ceilings(setup: Setup, budget: float) -> Iterator[list[Row]]:
    """What the GPU was seen to reach, for the floors."""
    found = setup.ceilings
    for name, value in (("float16", found.half), ("tf32", found.tf32), ("fp32", found.fp32)):
        yield [
            setup.provenance.row(
                case="product of 8192 x 8192 matrices", batch=1, direction="ceiling", backend=f"torch, {name}",
                metric="rate", unit="TFLOP/s", q50=value / 1e12, rounds=5,
            )
        ]  # fmt: skip
    yield [
        setup.provenance.row(
            case="copy of 4 GiB", batch=1, direction="ceiling", backend="torch", metric="rate", unit="TB/s",
            q50=found.copy / 1e12, rounds=5,
        )
    ]  # fmt: skip


def _free(setup: Setup) -> None:
    gc.collect()
    if setup.device.type == "cuda":
        torch.cuda.empty_cache()


PARTS: dict[str, tuple[float, Callable[[Setup, float], Iterator[list[Row]]]]] = {
    "ceilings": (0.01, part_ceilings),
    "latency": (0.30, part_latency),
    "throughput": (0.14, part_throughput),
    "gradient": (0.08, part_gradient),
    "stream": (0.12, part_stream),
    "accuracy": (0.02, part_accuracy),
    "moments": (0.10, part_moments),
    "peers": (0.13, part_peers),
    "compile": (0.20, part_compile),
}
"""Parts in order of importance, each with its share of the time."""


def show(rows: Sequence[Row]) -> None:
    """Print rows for people."""
    for row in rows:
        ratio = f"{row.ratio:8.2f} x {row.ratio_to}" if isinstance(row.ratio, float) and row.ratio_to else ""
        what = f"{row.direction}, {row.case}, batch {row.batch}: {row.backend}"
        metric = "" if row.metric == "time" else row.metric
        print(f"{what:96s} {row.q50:10.4g} {row.unit:8s} {metric:36s} {ratio}", flush=True)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, separated by commas: {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, help="folder for <gpu>.csv; nothing is written if not given")
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}/<gpu>.csv")
    parser.add_argument("--budget", type=float, default=240.0, help="seconds for all parts")
    parser.add_argument("--commit", help="of the sources, where they have no history; '-dirty' behind it if changed")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--rehearse", action="store_true", help="small cases, to find mistakes")
    options = parser.parse_args()
    parts = options.only.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        parser.error(f"no part named {', '.join(unknown)}; there are {', '.join(PARTS)}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU; --rehearse --device cpu tries the program out")
    if options.record and options.rehearse:
        parser.error("a rehearsal is not what the results are about; leave out --record or --rehearse")
    found = engines(device)
    if not found:
        reasons = [f"{v.backend}: {v.reason}" for v in cl.explain(device=device).verdicts if v.reason]
        parser.error(f"no backend of ours runs here; {'; '.join(reasons)}")
    provenance = Provenance.of(device, options.commit)
    case = rehearsal_case(3) if options.rehearse else all_models()
    setup = Setup(
        device,
        case,
        reference(case, device),
        rehearsal_case(1) if options.rehearse else one_model(),
        found,
        provenance,
        ceilings(device, quick=options.rehearse),
        options.rehearse,
    )
    files = [folder / f"{slug(provenance.name)}.csv" for folder in (options.out, options.record and RESULTS) if folder]
    print(
        f"{provenance.name}, driver {provenance.driver}, torch {torch.__version__}, ours: {', '.join(found)}",
        flush=True,
    )
    rows: list[Row] = []
    signal.signal(signal.SIGTERM, _stopped)
    try:
        failed = run_parts(setup, parts, options.budget, files, rows)
    except StoppedError:
        failed = ["what was still to come when the time ran out"]
    summarise(rows)
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


class StoppedError(BaseException):
    """Somebody asked the process to end."""


def _stopped(number: int, frame: object) -> None:
    raise StoppedError


def run_parts(setup: Setup, parts: Sequence[str], budget: float, files: Sequence[Path], found: list[Row]) -> list[str]:
    """Run the parts; one that fails costs its own remaining rows only. Adds rows to `found`; the parts that failed."""
    failed = []
    start = time.perf_counter()
    total = sum(PARTS[part][0] for part in parts)
    for part in parts:
        share, work = PARTS[part]
        print(f"--- {part} (at {time.perf_counter() - start:.0f} s)", flush=True)
        try:
            for rows in work(setup, budget * share / total):
                show(rows)
                found += rows
                for file in files:
                    append(rows, file)
        except Exception:  # the other parts are still worth having
            traceback.print_exc()
            failed.append(part)
        _free(setup)
    synchronize(setup.device)
    print(f"--- {time.perf_counter() - start:.0f} s", flush=True)
    return failed


def summarise(rows: Sequence[Row]) -> None:
    """Print what the README would say, and the targets."""
    recorded = [{key: str(value) for key, value in asdict(row).items()} for row in rows]
    print(report_gpu.report(recorded))
    print(*[target.line(recorded) for target in report_gpu.targets()], sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""The bank of compact models on a CPU against other engines: forward, input gradient, whole banks, threads, accuracy.

    python benchmarks/bench_bank.py [--only forward,gradient,...] [--threads 1,2] [--record]

Each part runs in a process of its own with a fixed number of threads, so that no engine's idle threads or settings
reach another part; within a part, candidate and peers alternate. Before any clock starts, every contender's result is
compared with the float64 module: a contender that is wrong gets no number, and if it is ours, the run fails.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import cortexloop as cl
import peers
from cases import Case, all_models, one_model
from cortexloop.models import CompactModel
from record import RESULTS, Contender, Row, append, machine, measure, provenance, quantiles

EXACT, FAST, PEAK = "cortexloop exact", "cortexloop fast", "fp32 FMA peak of one core"

# Largest error that still counts as the same network, in standard deviations of each model's responses over images.
# fp32 engines stay below 1e-4; bfloat16 ones differ by a few hundredths, which the accuracy part reports.
RESPONSE_LIMIT = {"fp32": 1e-3, "reduced": 0.25}
GRADIENT_LIMIT = 5e-3  # relative L2; a single ReLU gate that rounds to the other side costs up to this much
REDUCED = (FAST, "OpenVINO bf16")


class WrongResultError(Exception):
    """The candidate disagrees with the float64 reference; no time is worth reporting."""


# --- the candidate ------------------------------------------------------------------------------------------------


def candidate_forward(case: Case, precision: str = "exact", *, threads: int | None = None, name: str = "") -> Contender:
    """`cl.responses` on uint8 NHWC images: recentring and validation are inside the clock."""
    bank = cl.ModelBank.from_weights(case.models)

    def run() -> NDArray[np.float32]:
        return cl.responses(case.images, bank, precision=precision, backend=backend())

    default = EXACT if precision == "exact" else FAST
    return Contender(name or default, run, lambda: run().astype(np.float64), _with_threads(threads))


def candidate_gradient(case: Case, *, threads: int | None = None, name: str = EXACT) -> Contender:
    """`cl.input_gradient` of the sum of all responses on float32 NHWC images; computes the forward pass as well."""
    bank = cl.ModelBank.from_weights(case.models)
    images = case.recentred()
    cotangent = np.ones((case.batch, len(bank)), np.float32)

    def run() -> NDArray[np.float32]:
        return cl.input_gradient(images, bank, cotangent, backend=backend())

    return Contender(name, run, lambda: run().astype(np.float64), _with_threads(threads))


def candidate_one_by_one(case: Case, precision: str = "exact") -> Contender:
    """A bank per model, called in turn: what the evaluations cost without the bank."""
    banks = [cl.ModelBank.from_weights([m]) for m in case.models]

    def run() -> list[NDArray[np.float32]]:
        return [cl.responses(case.images, bank, precision=precision, backend=backend()) for bank in banks]

    return Contender("cortexloop, one call per model", run, lambda: np.concatenate(run(), axis=1).astype(np.float64))


def _with_threads(threads: int | None) -> Callable[[], Any]:
    return (lambda: None) if threads is None else (lambda: cl.set_num_threads(threads))


def backend() -> str:
    """The compiled kernels; the reference where the parent was told so, to try the runner out without them."""
    return "reference" if "--reference" in sys.argv else "cpu"


def fast_supported() -> bool:
    """Whether the reduced-precision forward exists on this processor."""
    if backend() != "cpu":
        return False
    from cortexloop import _native

    return bool(_native.cpu().fast_supported())


def isa() -> str:
    """The instruction set of the candidate's kernels."""
    if backend() != "cpu":
        return ""
    from cortexloop import _native

    return _native.isa()


@cache
def fma_library() -> ctypes.CDLL | None:
    """`peak.cpp`, compiled for this processor; None without a C++ compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    folder = Path(tempfile.mkdtemp(prefix="cortexloop-peak-"))
    try:
        target = folder / "peak.so"
        source = Path(__file__).with_name("peak.cpp")
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(target)], check=True, timeout=120)
        library = ctypes.CDLL(str(target))
    finally:
        shutil.rmtree(folder)
    library.multiply_add.argtypes, library.multiply_add.restype = [ctypes.c_long], ctypes.c_float
    return library


def fma_peak(flop: float) -> list[Contender]:
    """As many operations as a direct computation of the case needs, at the rate of the FMA units of one core."""
    library = fma_library()
    if library is None:
        return []
    steps = int(flop / 2 / library.multiply_adds_per_step())
    return [Contender(PEAK, lambda: library.multiply_add(steps), lambda: np.empty(0))]


# --- the gate -----------------------------------------------------------------------------------------------------


def reference_responses(case: Case) -> NDArray[np.float64]:
    """float64 responses [B, N] of the readable module, which never sees packed weights."""
    images = torch.from_numpy(case.images.astype(np.float64) - case.models[0].image_mean)
    with torch.inference_mode():
        columns = [CompactModel.from_weights(m).double().eval()(images) for m in case.models]
    return torch.stack(columns, dim=1).numpy()


def reference_gradient(case: Case) -> NDArray[np.float64]:
    """float64 gradient [B, H, W, 3] of the sum of all responses."""
    images = torch.from_numpy(case.recentred().astype(np.float64)).requires_grad_()
    total = np.zeros(case.images.shape)
    for model in case.models:
        module = CompactModel.from_weights(model).double().eval().requires_grad_(False)
        total += torch.autograd.grad(module(images).sum(), images)[0].numpy()
    return total


def gate_responses(contenders: Sequence[Contender], case: Case, spread: NDArray[np.float64]) -> list[Contender]:
    """Those contenders whose responses are right.

    Args:
        spread: [N] standard deviation of each model's responses over images.

    Raises:
        WrongResultError: the candidate's are not.
    """
    expected = reference_responses(case)

    def error(contender: Contender) -> tuple[float, float]:
        limit = RESPONSE_LIMIT["reduced" if contender.name in REDUCED else "fp32"]
        return float(np.max(np.abs(contender.fetch() - expected) / spread)), limit

    return _gate(contenders, error, "largest error in standard deviations")


def gate_gradient(contenders: Sequence[Contender], case: Case) -> list[Contender]:
    """Those contenders whose gradient is right. Raises as `gate_responses` does."""
    expected = reference_gradient(case)
    norm = np.linalg.norm(expected)
    return _gate(
        contenders,
        lambda contender: (float(np.linalg.norm(contender.fetch() - expected) / norm), GRADIENT_LIMIT),
        "relative L2 error of the gradient",
    )


def _gate(
    contenders: Sequence[Contender], error: Callable[[Contender], tuple[float, float]], what: str
) -> list[Contender]:
    passed = []
    for contender in contenders:
        if contender.name == PEAK:
            passed.append(contender)
            continue
        contender.prepare()
        value, limit = error(contender)
        if value <= limit:
            passed.append(contender)
            continue
        sentence = f"{contender.name}: {what} is {value:.3g}, at most {limit:g} is right"
        if contender.name.startswith("cortexloop"):
            raise WrongResultError(sentence)
        print(f"no number for {sentence}", file=sys.stderr)
    return passed


# --- the parts: each returns rows -----------------------------------------------------------------------------------


def _version(name: str) -> str:
    for prefix, package in (("torch", "torch"), ("ONNX", "onnxruntime"), ("OpenVINO", "openvino")):
        if name.startswith(prefix):
            return importlib.metadata.version(package)
    return str(cl.__version__) if name.startswith("cortexloop") else ""


def _row(case: Case, op: str, direction: str, name: str, threads: int, metric: str, unit: str, **values: Any) -> Row:
    empty = {"q20": values["q50"], "q80": values["q50"], "rounds": 1}
    ratios = {"ratio_to": "", "ratio": "", "ratio_q20": "", "ratio_q80": ""}
    where: dict[str, Any] = dict(provenance())
    return Row(
        case=case.name,
        batch=case.batch,
        op=op,
        direction=direction,
        backend=name,
        version=_version(name),
        isa=isa() if name.startswith("cortexloop") else "",
        threads=threads,
        metric=metric,
        unit=unit,
        **{**empty, **ratios, **values, **where},
    )


def timed(
    contenders: Sequence[Contender],
    case: Case,
    op: str,
    direction: str,
    threads: int,
    budget: float,
    thread_counts: dict[str, int] | None = None,
) -> list[Row]:
    """Time the contenders interleaved: milliseconds per evaluation, and each one's ratio to the first."""
    times = measure(contenders, budget=budget)
    first = contenders[0].name
    rows = []
    for name, seconds in times.items():
        per_evaluation = seconds * 1e3 / case.evaluations
        q50, q20, q80 = quantiles(per_evaluation)
        ratio, ratio_q20, ratio_q80 = quantiles(seconds / times[first])
        used = (thread_counts or {}).get(name, 1 if name == PEAK else threads)
        rows.append(
            _row(
                case, op, direction, name, used, "time", "ms/evaluation",
                q50=q50, q20=q20, q80=q80, rounds=len(seconds),
                ratio_to=first, ratio=ratio, ratio_q20=ratio_q20, ratio_q80=ratio_q80,
            )
        )  # fmt: skip
    return rows


def _candidates(case: Case) -> list[Contender]:
    return [candidate_forward(case), *([candidate_forward(case, "fast")] if fast_supported() else [])]


def part_forward(threads: int, budget: float) -> list[Row]:
    """One model, batches of 1, 16 and 64, against every engine."""
    case = one_model()
    spread = reference_responses(case.with_batch(16)).std(axis=0)
    rows = []
    for batch in (1, 16, 64):
        part = case.with_batch(batch)
        contenders = [
            *_candidates(part),
            peers.torch_forward(part, folded=False),
            peers.torch_forward(part, folded=True),
            peers.torch_forward(part, folded=True, compiled=True),
            peers.onnxruntime_forward(part, threads),
            peers.openvino_forward(part, threads, "f32"),
            peers.openvino_forward(part, threads, "bf16"),
            *(fma_peak(part.flop) if threads == 1 else []),
        ]
        rows += timed(gate_responses(contenders, part, spread), part, "bank", "forward", threads, budget)
    return rows


def part_gradient(threads: int, budget: float) -> list[Row]:
    """Forward and input gradient of one model, batches of 1 and 16; inference engines have no gradient."""
    case = one_model()
    rows = []
    for batch in (1, 16):
        part = case.with_batch(batch)
        contenders = [
            candidate_gradient(part),
            peers.torch_gradient(part, folded=False),
            peers.torch_gradient(part, folded=True),
            peers.torch_gradient(part, folded=True, compiled=True),
            *(fma_peak(2 * part.flop) if threads == 1 else []),
        ]
        rows += timed(gate_gradient(contenders, part), part, "bank", "forward+gradient", threads, budget)
    return rows


def part_bank(threads: int, budget: float) -> list[Row]:
    """All models at once: against one call per model, and some of them against loops over torch modules."""
    everything = all_models()
    rows = []
    for batch in (1, 16):
        case = everything.with_batch(batch)
        contenders = [*_candidates(case), candidate_one_by_one(case)]
        if batch == 1:
            spread = reference_responses(everything.with_batch(8)).std(axis=0)
            contenders = gate_responses(contenders, case, spread)
        rows += timed(contenders, case, "bank", "forward", threads, budget)
    some = Case(f"every 12th of {everything.name}", everything.models[::12], everything.images).with_batch(16)
    contenders = [
        *_candidates(some),
        peers.torch_forward(some, folded=False),
        peers.torch_forward(some, folded=True),
        peers.openvino_forward(some, threads, "f32"),
    ]
    spread = reference_responses(some).std(axis=0)
    rows += timed(gate_responses(contenders, some, spread), some, "bank", "forward", threads, budget)
    return rows


def part_scaling(threads: int, budget: float) -> list[Row]:
    """A bank with all threads against the same bank with one."""
    if threads == 1:
        return []
    everything = all_models()
    case = Case(f"every 3rd of {everything.name}", everything.models[::3], everything.images).with_batch(16)
    rows = []
    for direction, precision in (("forward", "exact"), ("forward", "fast"), ("forward+gradient", "exact")):
        if precision == "fast" and not fast_supported():
            continue
        label = f"cortexloop {precision}"
        names = {f"{label}, {threads} threads": threads, f"{label}, 1 thread": 1}
        if direction == "forward":
            contenders = [candidate_forward(case, precision, threads=n, name=name) for name, n in names.items()]
        else:
            contenders = [candidate_gradient(case, threads=n, name=name) for name, n in names.items()]
        rows += timed(contenders, case, "bank", direction, threads, budget, names)
    return rows


def part_avx2(threads: int, budget: float) -> list[Row]:
    """The AVX2 kernels against torch.compile, which keeps this processor's best instructions."""
    case = one_model()
    spread = reference_responses(case.with_batch(16)).std(axis=0)
    rows = []
    for batch in (1, 16):
        part = case.with_batch(batch)
        contenders = [candidate_forward(part), peers.torch_forward(part, folded=True, compiled=True)]
        contenders = gate_responses(contenders, part, spread)
        rows += timed(contenders, part, "bank, AVX2 kernels", "forward", threads, budget)
    return rows


def part_overhead(threads: int, budget: float) -> list[Row]:
    """One model on one image through the general call and through a Plan with its buffers bound."""
    if threads != 1:
        return []
    case = one_model().with_batch(1)
    bank = cl.ModelBank.from_weights(case.models)
    plan = cl.Plan(bank, 1)
    plan.images[...] = case.images

    def run() -> Any:
        return plan.run()

    through_plan = Contender("cortexloop exact, Plan", run, lambda: np.asarray(run(), dtype=np.float64))
    return timed([candidate_forward(case), through_plan], case, "bank, call overhead", "forward", threads, budget)


def part_accuracy(threads: int, budget: float) -> list[Row]:
    """Error against float64 over models and images: largest error in SDs, and correlation with float64 responses."""
    if threads != 1:
        return []
    everything = all_models()
    case = Case(f"every 12th of {everything.name}", everything.models[::12], everything.images)
    expected = reference_responses(case)
    spread = expected.std(axis=0)
    contenders = [
        *_candidates(case),
        peers.torch_forward(case, folded=True),
        peers.onnxruntime_forward(case, threads),
        peers.openvino_forward(case, threads, "f32"),
        peers.openvino_forward(case, threads, "bf16"),
    ]
    rows = []
    for contender in contenders:
        got = contender.fetch()
        errors = np.abs(got - expected).max(axis=0) / spread
        centred, wanted = got - got.mean(axis=0), expected - expected.mean(axis=0)
        r = (centred * wanted).sum(axis=0) / np.sqrt((centred**2).sum(axis=0) * (wanted**2).sum(axis=0))
        for metric, unit, values in (("largest error", "SD", errors), ("1 - Pearson r", "1", 1 - r)):
            q50, q20, q80 = quantiles(values)
            rows.append(
                _row(
                    case, "bank", "forward", contender.name, threads, f"{metric}, quantiles over models", unit,
                    q50=q50, q20=q20, q80=q80, rounds=len(values),
                )
            )  # fmt: skip
            worst = float(values.max())
            rows.append(
                _row(case, "bank", "forward", contender.name, threads, f"{metric}, worst model", unit, q50=worst)
            )
    return rows


PARTS: dict[str, Callable[[int, float], list[Row]]] = {
    "forward": part_forward,
    "gradient": part_gradient,
    "bank": part_bank,
    "scaling": part_scaling,
    "avx2": part_avx2,
    "overhead": part_overhead,
    "accuracy": part_accuracy,
}


# --- the runner -----------------------------------------------------------------------------------------------------


def _child(part: str, threads: int, budget: float, rows_file: Path) -> None:
    torch.set_num_threads(threads)
    cl.set_num_threads(threads)
    rows = PARTS[part](threads, budget)
    rows_file.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


def run_part(part: str, threads: int, budget: float, *, reference: bool = False) -> list[Row]:
    """Run one part in a fresh process.

    Raises:
        RuntimeError: the process failed; its own message is above.
    """
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), CORTEXLOOP_NUM_THREADS=str(threads))
    if part == "avx2":
        environment["CORTEXLOOP_ISA"] = "avx2"
    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--child", part, "--threads", str(threads), "--budget", str(budget)]
        command += ["--rows-file", str(rows_file), *(["--reference"] if reference else [])]
        done = subprocess.run(command, env=environment, check=False, timeout=900)
        if done.returncode != 0:
            raise RuntimeError(f"part {part!r} with {threads} threads failed with exit code {done.returncode}")
        return [Row(**row) for row in json.loads(rows_file.read_text(encoding="utf-8"))]


def show(rows: Sequence[Row]) -> None:
    """Print rows for people."""
    for row in rows:
        ratio = f"{row.ratio:8.2f} x {row.ratio_to}" if isinstance(row.ratio, float) and row.ratio_to else ""
        spread = f"{row.q50:10.4g} [{row.q20:.4g}, {row.q80:.4g}] {row.unit}"
        label = f"{row.direction}, {row.case}, batch {row.batch}, {row.threads} thr: {row.backend}"
        print(f"{label:108s} {spread:44s} {ratio} {row.metric if row.metric != 'time' else ''}")


def main() -> int:
    """Measure, print, and on request record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, separated by commas: {', '.join(PARTS)}")
    parser.add_argument("--threads", default="1,2", help="thread counts, separated by commas")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds for each set of contenders")
    parser.add_argument("--record", action="store_true", help=f"append rows to {RESULTS.name}/<machine>.csv")
    parser.add_argument("--busy", action="store_true", help="record although other programs are using the processor")
    parser.add_argument("--reference", action="store_true", help="try the runner out on the reference backend")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rows-file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options.child, int(options.threads), options.budget, options.rows_file)
        return 0
    parts = options.only.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        parser.error(f"no part named {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if options.record and options.reference:
        parser.error("the reference backend is not what the results are about; leave out --record or --reference")
    if options.record and not options.busy and os.getloadavg()[0] > 0.75:
        parser.error(
            f"the load average is {os.getloadavg()[0]:.1f}: on a busy machine engines that spin at barriers look far "
            "slower than they are; wait until it is below 0.75, or add --busy"
        )
    start = time.perf_counter()
    failed = []
    for part in parts:
        for threads in map(int, options.threads.split(",")):
            try:
                rows = run_part(part, threads, options.budget, reference=options.reference)
            except RuntimeError as error:  # the other parts are still worth having
                failed.append(str(error))
                continue
            show(rows)
            if options.record and rows:
                append(rows, RESULTS / f"{machine()}.csv")
    print(f"{time.perf_counter() - start:.0f} s", *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

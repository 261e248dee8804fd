"""Evolution on a CPU: the optimiser's step against other packages, and complete generations against plain torch.

    python benchmarks/bench_evolution.py [--only step,full,generation] [--threads 1,2] [--record]

Each part runs in a process of its own with a fixed number of threads; within a part, candidate and peers alternate.
Before any clock starts, the candidate's codes are compared with a dense float64 recursion, and every peer has to climb
a slope; a contender that is wrong gets no number, and if it is ours, the run fails.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import cortexloop as cl
import evolution_peers as peers
from bench_bank import WrongResultError, isa, show
from cases import Case, all_models
from cortexloop import evolve, ops
from evolution_peers import Objective, Peer
from peers import torch_network
from record import RESULTS, Contender, Row, append, machine, measure, provenance, quantiles

DIM, POPULATION, SIGMA = 4096, 40, 3.0
SESSION, SLICES = 75, 5
"""Generations of a published session; the candidate's optimisers start anew after as many. As many rounds as slices of
it see each part of a session once."""
PERIOD = 11
"""Generations from one update of the Cholesky factor to the next."""

CHOLESKY, DIAGONAL = "cortexloop CholeskyCMA", "cortexloop DiagonalCMA"
OURS, PLAIN = "cortexloop", "torch, one problem after another"

CODE_LIMIT = 1e-3  # largest difference of a code's entry from the float64 recursion, in standard deviations of codes
SCORE_LIMIT = 0.1  # largest difference of a score from plain torch, which does not round images, in standard deviations
CENTRE_LIMIT = 1e-4  # largest difference of a peer's mean from the weighted mean of its codes, in initial step sizes


# --- the candidate ------------------------------------------------------------------------------------------------


def candidate(name: str, problems: int, dim: int = DIM) -> Peer:
    """One of our optimisers, all problems in one batch; a new one after each session.

    A timed run is a whole session, as the Cholesky factor grows with it; for many problems, a slice of one.
    """
    kind = {CHOLESKY: evolve.CholeskyCMA, DIAGONAL: evolve.DiagonalCMA}[name]

    def new() -> Any:
        return kind(dim, problems=problems, population=POPULATION, sigma=SIGMA)

    held = [new()]
    codes = torch.empty(problems, POPULATION, dim)  # the same memory in every generation, as `Evolution` does it

    def step(objective: Objective) -> None:
        if held[0].generation == SESSION:
            held[0] = new()
        held[0].tell(objective(held[0].ask(out=codes)))

    return Peer(
        name,
        "cortexloop",
        step,
        torch.from_numpy,
        batched=True,
        centre=lambda: held[0].centre.double().numpy(),
        generations=SESSION if problems <= 16 else SESSION // SLICES,
    )


# --- the gate -----------------------------------------------------------------------------------------------------


def rank_weights(population: int) -> NDArray[np.float64]:
    """Weights of the better half from best to worst, w_i ~ ln(mu + 1/2) - ln(i)."""
    mu = population // 2
    weights = math.log(mu + 0.5) - np.log(np.arange(1, mu + 1))
    return np.asarray(weights / weights.sum())


def best_first(codes: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """The better half of the codes [m, dim], best first."""
    return np.asarray(codes[np.argsort(-scores, kind="stable")[: len(scores) // 2]])


Recursion = Generator[NDArray[np.float64], NDArray[np.float64], None]
"""Yields the codes [m, dim] of the next generation; its `send` takes their scores [m]."""


def cholesky_recursion(normals: Callable[[int], NDArray[np.float64]], dim: int, population: int) -> Recursion:
    """The published recursion with dense matrices (Suttorp, Hansen & Igel 2009; constants of Wang & Ponce 2022).

    Args:
        normals: generation -> z [population, dim].
    """
    weights = rank_weights(population)
    mu_eff = 1 / np.square(weights).sum()
    c_c, c_1 = 4 / (dim + 4), 2 / (dim + 2**0.5) ** 2
    c_s = mu_eff**0.5 / (mu_eff**0.5 + dim**0.5)
    damping = 1 + c_s + 2 * max(0.0, ((mu_eff - 1) / (dim + 1)) ** 0.5 - 1)
    length = dim**0.5 * (1 - 1 / (4 * dim) + 1 / (21 * dim**2))
    mean, path_s, path_c, sigma = np.zeros(dim), np.zeros(dim), np.zeros(dim), SIGMA
    factor, inverse = np.eye(dim), np.eye(dim)
    generation, since = 0, 0
    while True:
        z = normals(generation)
        scores = yield mean + sigma * (z @ factor)
        chosen = weights @ best_first(z, scores)
        mean = mean + sigma * (chosen @ factor)
        path_s = (1 - c_s) * path_s + (c_s * (2 - c_s) * mu_eff) ** 0.5 * chosen
        path_c = (1 - c_c) * path_c + (c_c * (2 - c_c) * mu_eff) ** 0.5 * (chosen @ factor)
        sigma *= math.exp(c_s / damping * (np.linalg.norm(path_s) / length - 1))
        generation, since = generation + 1, since + population
        if since > 10 * population:
            since = 0
            v = path_c @ inverse
            n = v @ v
            r = (1 + n * c_1 / (1 - c_1)) ** 0.5
            factor = (1 - c_1) ** 0.5 * (factor + (r - 1) / n * np.outer(v, path_c))
            inverse = (inverse - (1 - 1 / r) / n * np.outer(inverse @ v, v)) / (1 - c_1) ** 0.5


def diagonal_recursion(normals: Callable[[int], NDArray[np.float64]], dim: int, population: int) -> Recursion:
    """Separable CMA-ES (Ros & Hansen 2008), constants of Hansen's tutorial (2016)."""
    weights = rank_weights(population)
    mu_eff = 1 / np.square(weights).sum()
    c_s = (mu_eff + 2) / (dim + mu_eff + 5)
    damping = 1 + c_s + 2 * max(0.0, ((mu_eff - 1) / (dim + 1)) ** 0.5 - 1)
    c_c = (4 + mu_eff / dim) / (dim + 4 + 2 * mu_eff / dim)
    c_1 = (dim + 2) / 3 * 2 / ((dim + 1.3) ** 2 + mu_eff)
    c_mu = (dim + 2) / 3 * 2 * (mu_eff - 2 + 1 / mu_eff) / ((dim + 2) ** 2 + mu_eff)
    c_1 = min(1.0, c_1)
    c_mu = min(1 - c_1, c_mu)
    length = dim**0.5 * (1 - 1 / (4 * dim) + 1 / (21 * dim**2))
    mean, path_s, path_c, sigma, variance = np.zeros(dim), np.zeros(dim), np.zeros(dim), SIGMA, np.ones(dim)
    generation = 0
    while True:
        z = normals(generation)
        scores = yield mean + sigma * np.sqrt(variance) * z
        chosen = best_first(z, scores)
        steps = np.sqrt(variance) * chosen
        mean = mean + sigma * (weights @ steps)
        path_s = (1 - c_s) * path_s + (c_s * (2 - c_s) * mu_eff) ** 0.5 * (weights @ chosen)
        sigma *= math.exp(c_s / damping * (np.linalg.norm(path_s) / length - 1))
        generation += 1
        decayed = (1 - (1 - c_s) ** (2 * generation)) ** 0.5
        moving = np.linalg.norm(path_s) / decayed < (1.4 + 2 / (dim + 1)) * length
        path_c = (1 - c_c) * path_c + moving * (c_c * (2 - c_c) * mu_eff) ** 0.5 * (weights @ steps)
        kept = 1 - c_1 - c_mu + (0.0 if moving else c_1 * c_c * (2 - c_c))
        variance = kept * variance + c_1 * path_c**2 + c_mu * (weights @ np.square(steps))


def slope(dim: int) -> NDArray[np.float64]:
    """The direction of better scores in the gate, of length 1."""
    direction = np.random.default_rng(1).standard_normal(dim)
    return np.asarray(direction / np.linalg.norm(direction))


def climb(peer: Peer, dim: int, generations: int) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Some generations with scores that grow along the slope: (codes [n, m, dim], scores [n, m]) after each."""
    direction = slope(dim)
    for _ in range(generations):
        shown: list[Any] = []

        def objective(codes: Any, shown: list[Any] = shown) -> Any:
            values = np.asarray(codes, dtype=np.float64)  # a copy: peers use their memory again
            scores = values @ direction
            shown.append((values.reshape(-1, *values.shape[-2:]), scores.reshape(-1, scores.shape[-1])))
            return peer.native(scores)

        peer.step(objective)
        yield np.concatenate([codes for codes, _ in shown]), np.concatenate([scores for _, scores in shown])


def recursion_error(name: str, problems: int, dim: int, generations: int) -> float:
    """Largest difference of any entry of a code from the dense float64 recursion, in standard deviations of codes.

    The first and the last problem are looked at. The recursion gets the candidate's random numbers and scores, and goes
    on with its own state.
    """
    recursion = {CHOLESKY: cholesky_recursion, DIAGONAL: diagonal_recursion}[name]

    def normals_of(problem: int) -> Callable[[int], NDArray[np.float64]]:
        ids = torch.tensor([problem], dtype=torch.int64)
        return lambda generation: ops.normals(0, 0, generation, ids, POPULATION, dim)[0].double().numpy()

    looked_at = sorted({0, problems - 1})
    expected = {problem: recursion(normals_of(problem), dim, POPULATION) for problem in looked_at}
    now = {problem: next(iterator) for problem, iterator in expected.items()}
    worst = 0.0
    for codes, scores in climb(candidate(name, problems, dim), dim, generations):
        for problem in looked_at:
            error = np.abs(codes[problem] - now[problem]).max() / now[problem].std(axis=0).mean()
            worst = max(worst, float(error))
            now[problem] = expected[problem].send(scores[problem])
    return worst


def check_candidate(name: str, problems: int) -> None:
    """Compare with the recursion: at full size over one covariance update, and in few dimensions, where they matter.

    Raises:
        WrongResultError: the codes differ.
    """
    for dim, generations in ((DIM, 13), (64, SESSION)):
        error = recursion_error(name, problems, dim, generations)
        if error > CODE_LIMIT:
            raise WrongResultError(
                f"{name}, {problems} problems, dim {dim}: largest difference from the float64 recursion is {error:.3g} "
                f"standard deviations, at most {CODE_LIMIT:g} is right"
            )


def works(peer: Peer, problems: int, dim: int = DIM, generations: int = 3) -> bool:
    """Whether a peer climbs, and its mean is the weighted mean of its best codes where it should be; says so if not."""
    weights = rank_weights(POPULATION)
    means = []
    for codes, scores in climb(peer, dim, generations):
        if codes.shape != (problems, POPULATION, dim):
            print(f"no number for {peer.name}: it showed {codes.shape}", file=sys.stderr)
            return False
        means.append(scores.mean(axis=1))
        if peer.centre is not None:
            expected = np.stack([weights @ best_first(c, s) for c, s in zip(codes, scores, strict=True)])
            error = float(np.abs(peer.centre() - expected).max()) / SIGMA
            if error > CENTRE_LIMIT:
                print(f"no number for {peer.name}: its mean is off by {error:.3g} step sizes", file=sys.stderr)
                return False
    gain = means[-1] - means[0]
    if gain.min() <= 0 or gain.mean() < 4 * SIGMA / POPULATION**0.5:  # a mean score has an error of SIGMA / sqrt(40)
        print(f"no number for {peer.name}: scores rose by {gain.mean():.3g} only", file=sys.stderr)
        return False
    return True


# --- time -----------------------------------------------------------------------------------------------------------


@dataclass
class Timed:
    """A contender, its package, the steps of a run, and the time that processors and the clock spent in its runs."""

    contender: Contender
    package: str
    steps: int
    processors: float = 0.0
    wall: float = 0.0

    def counted(self) -> Contender:
        """The contender, with its time counted."""

        def run() -> None:
            wall, processors = time.perf_counter(), time.process_time()
            self.contender.run()
            self.processors += time.process_time() - processors
            self.wall += time.perf_counter() - wall

        return Contender(self.contender.name, run, self.contender.fetch, self.contender.prepare)


def steps_of(peer: Peer) -> Timed:
    """Whole periods of a peer, with the same scores in every generation."""
    rng = np.random.default_rng(0)
    scores: list[Any] = []

    def objective(codes: Any) -> Any:
        if not scores:
            scores.append(peer.native(rng.standard_normal(np.shape(codes)[:-1])))
        return scores[0]

    def run() -> None:
        for _ in range(peer.generations):
            peer.step(objective)

    return Timed(Contender(peer.name, run, lambda: np.empty(0)), peer.package, peer.generations)


def _version(package: str) -> str:
    return str(cl.__version__) if package == "cortexloop" else importlib.metadata.version(package)


def _row(problems: int, case: str, direction: str, name: str, package: str, threads: int, **values: Any) -> Row:
    plain = {"q20": values["q50"], "q80": values["q50"], "rounds": 1}
    ratios = {"ratio_to": "", "ratio": "", "ratio_q20": "", "ratio_q80": ""}
    where: dict[str, Any] = dict(provenance())
    return Row(
        case=case,
        batch=problems,
        op="evolution",
        direction=direction,
        backend=name,
        version=_version(package),
        isa=isa() if package == "cortexloop" else "",
        threads=threads,
        **{**plain, **ratios, **values, **where},
    )


def timed(entries: Sequence[Timed], *, budget: float, rounds: tuple[int, int], **row: Any) -> list[Row]:
    """Time contenders interleaved, in milliseconds per step, and their ratios to the first.

    Args:
        rounds: at least and at most.

    Raises:
        WrongResultError: ours uses more threads than it may. (A peer that does is only reported.)
    """
    threads = row["threads"]
    times = measure([e.counted() for e in entries], budget=budget, min_rounds=rounds[0], max_rounds=rounds[1])
    per_step = [times[entry.contender.name] / entry.steps for entry in entries]
    first = entries[0].contender.name
    rows = []
    for entry, seconds in zip(entries, per_step, strict=True):
        name, used = entry.contender.name, entry.processors / entry.wall
        if used > threads + 0.15:
            sentence = f"{name} kept {used:.2f} processors busy, {threads} allowed"
            if entry.package == "cortexloop":
                raise WrongResultError(sentence)
            print(sentence, file=sys.stderr)
        q50, q20, q80 = quantiles(seconds * 1e3)
        ratio, ratio_q20, ratio_q80 = quantiles(seconds / per_step[0])
        rows.append(
            _row(
                name=name, package=entry.package, metric="time", q50=q50, q20=q20, q80=q80, rounds=len(seconds),
                ratio_to=first, ratio=ratio, ratio_q20=ratio_q20, ratio_q80=ratio_q80, **row,
            )
        )  # fmt: skip
    return rows


CASE = f"dim {DIM}, population {POPULATION}"


def rows_of_steps(taking_part: Sequence[Peer], problems: int, case: str, **timing: Any) -> list[Row]:
    """Rows of `ask` and `tell`; ours come first."""
    where: dict[str, Any] = {"problems": problems, "case": case, "direction": "optimiser step", "unit": "ms/step"}
    return timed([steps_of(peer) for peer in taking_part], **where, **timing)


def _steps(names: Sequence[str], others: Sequence[Peer], problems: int, **timing: Any) -> list[Row]:
    """Rows of our optimisers and of those peers that work."""
    for name in names:
        check_candidate(name, problems)
    taking_part = [*(candidate(name, problems) for name in names), *(p for p in others if works(p, problems))]
    return rows_of_steps(taking_part, problems, CASE, **timing)


# --- the parts: each returns rows -----------------------------------------------------------------------------------


def part_step(threads: int, budget: float) -> list[Row]:
    """ask + tell for 1, 16 and 256 problems against what costs O(population x dim): in a loop, and batched."""
    rows = []
    for problems in (1, 16, 256):
        size = (problems, DIM, POPULATION, SIGMA)
        others = [
            peers.pycma_diagonal(*size),
            peers.evotorch_cma(*size, separable=True),
            peers.evosax("Sep_CMA_ES", *size),
        ]
        if problems == 1:
            others += [
                peers.pycma_vd(*size),
                peers.evotorch_snes(*size),
                peers.evosax("SNES", *size),
                peers.evosax("SimpleGA", *size),
            ]
        else:
            others += [
                peers.evosax("Sep_CMA_ES", *size, form="vmap"),
                peers.evosax("Sep_CMA_ES", *size, form="map"),
                peers.evotorch_cem(*size),
                peers.evotorch_pgpe(*size),
            ]
        rounds = (5, 60) if problems < 256 else (SLICES, SLICES)
        rows += _steps((CHOLESKY, DIAGONAL), others, problems, threads=threads, budget=budget, rounds=rounds)
    return rows


def part_full(threads: int, budget: float) -> list[Row]:
    """ask + tell of one problem against full covariance matrices, each on its own; whole periods of decompositions.

    Between two steps of one, another's gigabytes would be given back to the system and be slow to get again.
    """
    size = (1, DIM, POPULATION, SIGMA)
    makers: list[Callable[[], Peer]] = [
        lambda: peers.pycma_full(*size),
        lambda: peers.evotorch_cma(*size, separable=False),
        lambda: peers.evosax("CMA_ES", *size),
    ]
    rows = []
    for make in makers:
        rows += _steps((CHOLESKY,), [make()], 1, threads=threads, budget=budget, rounds=(3, 3))
    return [row for row in rows if row.backend != CHOLESKY]  # its own row comes from the part "step", with more rounds


class Generations:
    """Complete generations of several problems, each with a model of its own: ours as one batch, and in plain torch.

    Evolutions in plain torch run one after another, as labs run them, so one of them has its state in memory at a time.
    """

    def __init__(self, case: Case, problems: int, dim: int = DIM) -> None:
        models = [case.models[index % len(case.models)] for index in range(problems)]
        size = models[0].height, models[0].width
        self.problems, self.dim, self.bank = problems, dim, cl.ModelBank.from_weights(models)
        self.generator = evolve.FourierGenerator(*size, dim)
        self.networks = [torch_network(model, folded=False) for model in models]
        layout = self.generator._layout  # which frequency each entry of a code belongs to
        cosines = peers.PlainCosines(
            *size, layout.axis, layout.ky, layout.kx, layout.amplitudes(), evolve.generators.base.COLOUR_AXES
        )
        self.plain = peers.PlainEvolution(self.networks[0], cosines, models[0].image_mean, dim, POPULATION, SIGMA)
        self.turn = 0
        self.shares: list[float] = []
        self.evolution = self.new()

    def new(self) -> evolve.Evolution:
        """Ours, at its first generation."""
        optimiser = evolve.CholeskyCMA(self.dim, problems=self.problems, population=POPULATION, sigma=SIGMA)
        objective = evolve.BankObjective(self.bank, range(self.problems))
        return evolve.Evolution(objective, optimiser, self.generator)

    def run(self) -> None:
        """A period of all problems, ours; sessions start anew."""
        if self.evolution.optimiser.generation + PERIOD > SESSION:
            self.evolution = self.new()
        for _ in range(PERIOD):
            seconds = self.evolution.step().seconds
            self.shares.append(seconds["optimise"] / sum(seconds.values()))

    def run_plain(self) -> None:
        """A period of one problem in plain torch; problems take turns."""
        self.plain.network = self.networks[self.turn % self.problems]
        self.turn += 1
        for _ in range(PERIOD):
            self.plain.step()

    def check(self) -> None:
        """Both sides give the same scores to codes, but for our rounding of images to 8 bits.

        Raises:
            WrongResultError: they do not.
        """
        rng = np.random.default_rng(0)
        codes = torch.from_numpy(SIGMA * rng.standard_normal((self.problems, POPULATION, self.dim))).float()
        scores = self.evolution.clean_scores(codes)
        for network, own_codes, own_scores in zip(self.networks, codes, scores, strict=True):
            self.plain.network = network
            with torch.no_grad():
                expected = self.plain.scores(own_codes).double()
            error = float((own_scores - expected).abs().max() / expected.std())
            if error > SCORE_LIMIT:
                raise WrongResultError(
                    f"scores differ by {error:.3g} standard deviations, at most {SCORE_LIMIT:g} is right"
                )


def rows_of_generations(both: Generations, models: str, threads: int, **timing: Any) -> list[Row]:
    """Rows of complete generations and of the optimiser's share in ours."""
    case = f"{models}, Fourier generator, dim {both.dim}, population {POPULATION}"
    where: dict[str, Any] = {"problems": both.problems, "case": case, "direction": "generation", "threads": threads}
    entries = [
        Timed(Contender(OURS, both.run, lambda: np.empty(0)), "cortexloop", PERIOD * both.problems),
        Timed(Contender(PLAIN, both.run_plain, lambda: np.empty(0)), "torch", PERIOD),
    ]
    rows = timed(entries, unit="ms/generation of one problem", **where, **timing)
    q50, q20, q80 = quantiles(np.asarray(both.shares))
    share = _row(
        name=OURS, package="cortexloop", metric="optimiser's share", unit="1",
        q50=q50, q20=q20, q80=q80, rounds=len(both.shares), **where,
    )  # fmt: skip
    return [*rows, share]


def part_generation(threads: int, budget: float) -> list[Row]:
    """Complete generations of 1, 16 and 64 problems; a run goes from one covariance update to the next."""
    models = all_models()
    rows = []
    for problems in (1, 16, 64):
        check_candidate(CHOLESKY, problems)
        both = Generations(models, problems)
        both.check()
        rows += rows_of_generations(both, models.name, threads, budget=budget, rounds=(3, 6))
    return rows


PARTS: dict[str, Callable[[int, float], list[Row]]] = {
    "step": part_step,
    "full": part_full,
    "generation": part_generation,
}


# --- the runner -----------------------------------------------------------------------------------------------------


def settle_memory() -> None:
    """Bring glibc's thresholds for giving memory back to the system to their largest values, for every contender alike.

    They grow with the largest block freed so far, up to 32 MiB. Below, torch's temporary tensors come fresh from the
    system again and again, which made plain torch up to 1.8 times slower where nothing large had been freed before.
    """
    block = torch.ones(31 << 18)
    del block


def _child(part: str, threads: int, budget: float, rows_file: Path) -> None:
    settle_memory()
    torch.set_num_threads(threads)
    cl.set_num_threads(threads)
    rows = PARTS[part](threads, budget)
    rows_file.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


def _environment(threads: int) -> dict[str, str]:
    """Every engine with its own number of threads; jax has no function for it."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC", "CORTEXLOOP_NUM_THREADS")
    eigen = "true" if threads > 1 else "false"
    return dict(
        os.environ,
        **dict.fromkeys(names, str(threads)),
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen={eigen}".strip(),
    )


def run_part(part: str, threads: int, budget: float) -> list[Row]:
    """Run one part in a fresh process.

    Raises:
        RuntimeError: the process failed; its own message is above.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--child", part, "--threads", str(threads), "--budget", str(budget)]
        command += ["--rows-file", str(rows_file)]
        done = subprocess.run(command, env=_environment(threads), check=False, timeout=900)
        if done.returncode != 0:
            raise RuntimeError(f"part {part!r} with {threads} threads failed with exit code {done.returncode}")
        return [Row(**row) for row in json.loads(rows_file.read_text(encoding="utf-8"))]


def main() -> int:
    """Measure, print, and on request record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, separated by commas: {', '.join(PARTS)}")
    parser.add_argument("--threads", default="1,2", help="thread counts, separated by commas")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds for each set of contenders")
    parser.add_argument("--record", action="store_true", help=f"append rows to {RESULTS.name}/<machine>.csv")
    parser.add_argument("--busy", action="store_true", help="record although other programs are using the processor")
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
                rows = run_part(part, threads, options.budget)
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

"""The README's tables say what was recorded, and the runners that record it work."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from project import ROOT

import cortexloop as cl

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The benchmark modules; they live beside the package and are run as scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_bank
    import bench_evolution
    import cases
    import evolution_peers
    import peers
    import record
    import report

    monkeypatch.setattr(bench_bank, "backend", lambda: "auto")  # timing is about kernels; whether it runs is not
    return SimpleNamespace(
        bank=bench_bank,
        evolution=bench_evolution,
        cases=cases,
        peers=peers,
        evolution_peers=evolution_peers,
        record=record,
        report=report,
    )


def test_readme_tables_are_generated_from_the_recorded_rows():
    command = [sys.executable, str(BENCHMARKS / "report.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def small_case(bench: SimpleNamespace, rng: np.random.Generator):
    models = tuple(bench.cases.random_model(f"m{i}", (5, 4, 3, 3, 3), rng, size=24) for i in range(2))
    return bench.cases.Case("small model", models, bench.cases.random_images(4, rng, size=24))


@pytest.mark.filterwarnings("ignore::cortexloop.BackendWarning")
def test_contenders_agree_with_the_reference(bench: SimpleNamespace, rng: np.random.Generator):
    """Every peer that the test extra installs passes the gate that stands before the clock, forward and gradient."""
    case = small_case(bench, rng)
    forward = [
        bench.bank.candidate_forward(case),
        bench.bank.candidate_one_by_one(case),
        bench.peers.torch_forward(case, folded=False),
        bench.peers.torch_forward(case, folded=True),
        bench.peers.onnxruntime_forward(case, 1),
    ]
    spread = bench.bank.reference_responses(case).std(axis=0)
    assert bench.bank.gate_responses(forward, case, spread) == forward
    gradient = [
        bench.bank.candidate_gradient(case),
        bench.peers.torch_gradient(case, folded=False),
        bench.peers.torch_gradient(case, folded=True),
    ]
    assert bench.bank.gate_gradient(gradient, case) == gradient


def test_a_wrong_candidate_gets_no_number(bench: SimpleNamespace, rng: np.random.Generator):
    case = small_case(bench, rng)
    right = bench.bank.reference_responses(case)

    def contender(name: str, error: float):
        return bench.record.Contender(name, lambda: None, lambda: right + error)

    spread = right.std(axis=0)
    assert bench.bank.gate_responses([contender("OpenVINO f32", 1.0)], case, spread) == []
    with pytest.raises(bench.bank.WrongResultError, match="cortexloop exact: largest error"):
        bench.bank.gate_responses([contender("cortexloop exact", 1.0)], case, spread)


@pytest.mark.filterwarnings("ignore::cortexloop.BackendWarning")
def test_rows_survive_the_file_and_reach_the_table(bench: SimpleNamespace, rng: np.random.Generator, tmp_path: Path):
    case = small_case(bench, rng)
    contenders = [bench.bank.candidate_forward(case), bench.peers.torch_forward(case, folded=False)]
    rows = bench.bank.timed(contenders, case, "bank", "forward", cl.get_num_threads(), budget=0.0)
    path = tmp_path / "somewhere.csv"
    bench.record.append(rows, path)
    bench.record.append(rows, path)
    recorded = bench.record.read(path)
    assert len(recorded) == 2 * len(rows)
    newest = bench.report.newest(recorded)
    assert newest == recorded[len(rows) :]
    text = bench.report.report(newest)
    assert "**cortexloop exact**" in text
    assert "torch eager" in text
    readme = f"a\n{bench.report.BEGIN}\nold\n{bench.report.END}\nb\n"
    assert bench.report.with_table(readme, text) == f"a\n{bench.report.BEGIN}\n{text}{bench.report.END}\nb\n"
    assert [target.line(newest) for target in bench.report.targets()]


def test_the_gate_of_evolution_is_green_for_ours(bench: SimpleNamespace):
    """At the size that is measured it runs before every clock; here in few dimensions, where the covariance changes."""
    for name in (bench.evolution.CHOLESKY, bench.evolution.DIAGONAL):
        for problems in (1, 3):
            assert bench.evolution.recursion_error(name, problems, 64, 40) < bench.evolution.CODE_LIMIT
            assert bench.evolution.works(bench.evolution.candidate(name, problems, 64), problems, 64)


def test_the_gate_of_evolution_is_red_for_another_recursion(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    slower = functools.partial(cl.evolve.CholeskyCMA, update_after=10**9)
    monkeypatch.setattr(cl.evolve, "CholeskyCMA", slower)
    monkeypatch.setattr(bench.evolution, "DIM", 64)
    with pytest.raises(bench.bank.WrongResultError, match=r"CholeskyCMA, 1 problems, dim 64: largest difference"):
        bench.evolution.check_candidate(bench.evolution.CHOLESKY, 1)


def test_a_peer_that_does_not_climb_or_centres_wrongly_gets_no_number(
    bench: SimpleNamespace, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
):
    def peer(centre):
        return bench.evolution_peers.Peer(
            "some peer", "numpy", lambda objective: objective(rng.standard_normal((40, 64))), np.asarray, centre=centre
        )

    assert not bench.evolution.works(peer(None), 1, 64)
    assert "scores rose by" in capsys.readouterr().err
    assert not bench.evolution.works(peer(lambda: np.ones((1, 64))), 1, 64)
    assert "its mean is off by" in capsys.readouterr().err


def test_plain_torch_computes_the_same_evolution(bench: SimpleNamespace, rng: np.random.Generator):
    """Its scores are those of our generator and bank, its optimiser is the float64 recursion."""
    case = small_case(bench, rng)
    both = bench.evolution.Generations(case, 2, dim=64)
    both.check()
    plain, z = both.plain, [rng.standard_normal((40, 64)) for _ in range(25)]
    recursion = bench.evolution.cholesky_recursion(lambda generation: z[generation], 64, 40)
    expected = next(recursion)
    for own_z in z[:-1]:
        own = torch.from_numpy(own_z).float()
        codes = plain.mean + plain.sigma * (own @ plain.factor)
        np.testing.assert_allclose(codes.numpy(), expected, rtol=1e-3, atol=1e-3)
        scores = expected @ bench.evolution.slope(64)
        plain.update(own, codes, torch.from_numpy(scores))
        expected = recursion.send(scores)


@pytest.mark.filterwarnings("ignore::cortexloop.BackendWarning")
def test_rows_of_evolution_reach_their_own_table(bench: SimpleNamespace, rng: np.random.Generator, tmp_path: Path):
    evolution, report = bench.evolution, bench.report
    both = evolution.Generations(small_case(bench, rng), 1, dim=64)
    rows = evolution.rows_of_generations(both, "small", threads=64, budget=0.0, rounds=(1, 1))
    ours = [evolution.candidate(name, 1, 64) for name in (evolution.CHOLESKY, evolution.DIAGONAL)]
    peer = bench.evolution_peers.Peer("some peer", "numpy", lambda objective: None, np.asarray)
    rows += evolution.rows_of_steps([*ours, peer], 1, "dim 64", threads=64, budget=0.0, rounds=(1, 1))
    path = tmp_path / "somewhere.csv"
    bench.record.append(rows, path)
    newest = report.newest(bench.record.read(path))
    assert len(newest) == len(rows) == 6
    text = report.evolution_report(newest)
    for found in ("**cortexloop CholeskyCMA**", f"some peer ({np.__version__})", "64 threads, 1 problem", "share of"):
        assert found in text
    assert report.report(newest) == ""
    assert report.evolution_report([]) == ""
    markers = f"{report.BEGIN}\n{report.END}\n"
    assert report.with_tables(markers, []) == markers
    with pytest.raises(ValueError, match="evolution:begin"):
        report.with_tables(markers, newest)
    both_markers = f"{markers}{report.EVOLUTION_BEGIN}\nold\n{report.EVOLUTION_END}\n"
    expected = f"{markers}{report.EVOLUTION_BEGIN}\n{text}{report.EVOLUTION_END}\n"
    assert report.with_tables(both_markers, newest) == expected
    assert [target.line(newest) for target in report.targets()]


def test_a_results_file_of_another_form_is_refused(bench: SimpleNamespace, tmp_path: Path):
    path = tmp_path / "old.csv"
    path.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="expected"):
        bench.record.append([], path)
    assert path.read_text(encoding="utf-8") == "a,b\n1,2\n"


def test_machine_names_are_slugs(bench: SimpleNamespace):
    assert bench.record.machine() == "".join(c for c in bench.record.machine() if c.isalnum() or c == "-")

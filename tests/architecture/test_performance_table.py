"""The README's performance table says what was recorded, and the runner that records it works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from project import ROOT

import cortexloop as cl

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The benchmark modules; they live beside the package and are run as scripts."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_bank
    import cases
    import peers
    import record
    import report

    monkeypatch.setattr(bench_bank, "backend", lambda: "auto")  # timing is about kernels; whether it runs is not
    return SimpleNamespace(bank=bench_bank, cases=cases, peers=peers, record=record, report=report)


def test_readme_table_is_generated_from_the_recorded_rows():
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


def test_a_results_file_of_another_form_is_refused(bench: SimpleNamespace, tmp_path: Path):
    path = tmp_path / "old.csv"
    path.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="expected"):
        bench.record.append([], path)
    assert path.read_text(encoding="utf-8") == "a,b\n1,2\n"


def test_machine_names_are_slugs(bench: SimpleNamespace):
    assert bench.record.machine() == "".join(c for c in bench.record.machine() if c.isalnum() or c == "-")

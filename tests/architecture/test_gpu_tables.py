"""The GPU benchmark's gate, clock and rows, and what the README makes of rows of a GPU. On a CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from project import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The benchmark's modules; they live beside the package and are run as scripts."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_gpu
    import gpu_measure
    import gpu_moments
    import gpu_peers
    import record
    import report
    import report_gpu

    return SimpleNamespace(
        bench=bench_gpu, measure=gpu_measure, moments=gpu_moments, peers=gpu_peers, record=record, report=report,
        report_gpu=report_gpu,
    )  # fmt: skip


@pytest.fixture
def setup(bench: SimpleNamespace) -> Any:
    case = bench.bench.rehearsal_case(2)
    provenance = bench.measure.Provenance("NVIDIA H200", "sm_90", "580.1", "0123abcd", False)
    answers = bench.bench.reference(case, CPU)
    ceilings = bench.measure.Ceilings(4e12, 8e14, 4e14, 6e13)
    return bench.bench.Setup(CPU, case, answers, case, ("reference",), provenance, ceilings, True)


def test_a_wrong_result_gets_no_number(bench: SimpleNamespace, setup: Any, capsys: pytest.CaptureFixture[str]) -> None:
    expected = setup.expected(3)

    def contender(name: str, error: float, reduced: bool = False) -> Any:
        wrong = expected + error * setup.spread
        return bench.measure.GpuContender(name, lambda i: None, lambda: wrong, reduced=reduced)

    good = [contender("cortexloop cuda, exact", 1e-5), contender("torch eager, fp16", 0.1, reduced=True)]
    assert bench.bench.right(good, expected, setup.spread) == good
    assert bench.bench.right([contender("torch eager, fp32", 0.1)], expected, setup.spread) == []
    assert "no number for torch eager, fp32: largest error is 0.1" in capsys.readouterr().out
    with pytest.raises(bench.bench.WrongResultError, match=r"cortexloop cuda, exact: largest error is 0\.1"):
        bench.bench.right([contender("cortexloop cuda, exact", 0.1)], expected, setup.spread)


def test_peers_compute_the_same_network(bench: SimpleNamespace, setup: Any) -> None:
    case = setup.case
    made = [bench.peers.eager, bench.peers.captured, bench.peers.grouped]
    contenders = [make(case, kind, CPU, 2) for make in made for kind in ("fp32", "fp16")]
    assert bench.bench.right(contenders, setup.answers, setup.spread) == contenders


def test_grouped_convolutions_need_one_form(bench: SimpleNamespace, setup: Any) -> None:
    models = setup.case.models
    shorter = dataclasses.replace(models[0], layers=models[0].layers[:-1])
    with pytest.raises(ValueError, match="need models of one form, got 2 forms"):
        bench.peers.GroupedBank([models[1], shorter])


def test_answers_of_larger_batches_are_repeated(bench: SimpleNamespace, setup: Any) -> None:
    case = setup.case.with_batch(6)
    np.testing.assert_allclose(setup.expected(6), bench.bench.reference(case, CPU), rtol=1e-12)


def test_contenders_take_turns(bench: SimpleNamespace) -> None:
    log: list[str] = []

    def contender(name: str) -> Any:
        return bench.measure.GpuContender(
            name, lambda i: log.append(name), lambda: np.empty(0), prepare=lambda: log.append(name.upper())
        )

    pair = [contender("a"), contender("b")]
    times = bench.measure.measure(pair, CPU, budget=0.0, slot=0.0, min_rounds=3)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3}
    assert "".join(log) == "AaaBbb" + "AaBb" + "BbAa" + "AaBb"
    with pytest.raises(ValueError, match="need different names"):
        bench.measure.measure([pair[0], pair[0]], CPU, budget=0.0)


def test_every_call_counts_in_a_latency(bench: SimpleNamespace) -> None:
    calls: list[int] = []
    seconds = bench.measure.latencies(lambda: calls.append(1), count=50, budget=60.0)
    assert len(seconds) == 50
    assert len(calls) == 100  # as many to warm up
    assert len(bench.measure.latencies(lambda: None, count=1000, budget=0.0)) == 20


def test_a_part_that_fails_costs_only_its_own_rows(
    bench: SimpleNamespace, setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def broken(setup: Any, budget: float) -> Any:
        yield [setup.provenance.row(case="c", batch=1, direction="d", backend="b", metric="m", unit="u", q50=1.0)]
        raise RuntimeError("the kernel failed")

    monkeypatch.setitem(bench.bench.PARTS, "latency", (1.0, broken))
    rows: list[Any] = []
    failed = bench.bench.run_parts(setup, ["latency", "ceilings"], 1.0, [tmp_path / "rows.csv"], rows)
    assert failed == ["latency"]
    assert len(rows) == len(bench.record.read(tmp_path / "rows.csv")) == 5
    assert "RuntimeError: the kernel failed" in capsys.readouterr().err


def recorded(bench: SimpleNamespace, setup: Any, scale: float) -> list[dict[str, str]]:
    """Rows of the parts that a rehearsal runs, as if the CUDA backend had run `scale` times faster."""
    rows: list[Any] = []
    parts = ["ceilings", "latency", "throughput", "gradient", "stream", "accuracy", "moments", "peers"]
    assert bench.bench.run_parts(setup, parts, 0.0, [], rows) == []
    found = []
    for row in rows:
        if row.backend.startswith("cortexloop"):
            divisor = scale if row.unit in ("us/pair", "us", "s") else 1.0
            ratio = row.ratio / scale if isinstance(row.ratio, float) and "alone" not in row.backend else row.ratio
            name = row.backend.replace("reference", "cuda")
            row = dataclasses.replace(row, backend=name, q50=row.q50 / divisor, ratio=ratio)
        found.append({key: str(value) for key, value in dataclasses.asdict(row).items()})
    return found


def test_wrong_moments_get_no_number(bench: SimpleNamespace, setup: Any, capsys: pytest.CaptureFixture[str]) -> None:
    batch = bench.moments.Batch.of(4, 30, 3, CPU, torch.float32)

    def off(name: str) -> Any:
        return bench.measure.GpuContender(name, lambda i: None, lambda: 1.001 * batch.expected())

    good = [bench.moments.ours(batch, "reference"), bench.moments.torch_product(batch, "fp32")]
    assert [found for found, error in bench.moments.right(good, batch.expected())] == good
    assert list(bench.moments.right([off("torch")], batch.expected())) == []
    assert "no number for torch: the products are off by 0.001" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"cortexloop cuda: the products are off by 0\.001"):
        list(bench.moments.right([off("cortexloop cuda")], batch.expected()))


def test_rows_of_a_gpu_become_their_own_section(bench: SimpleNamespace, setup: Any) -> None:
    rows = recorded(bench, setup, 1e6)
    text = bench.report_gpu.report(rows)
    for found in (
        "Measured on NVIDIA H200 (driver 580.1, torch",
        "800 TFLOP/s",
        "**Latency: one image, host to host, rehearsal**",
        "**cortexloop cuda, fast**",
        "torch, grouped convolutions, fp16",
        "500,000 images at this rate",
        "share of the floor",
        "**Against torch, rehearsal, tf32 peers**",
        "1 - r, median model",
        "**Streaming moments of features and responses, D = 300, T = 5, float32 features**",
        "torch var_mean and addmm, tf32",
    ):
        assert found in text, found
    lines = [target.line(rows) for target in bench.report_gpu.targets()]
    assert sum(line.startswith("met") for line in lines) >= 6
    assert sum(line.startswith("not measured") for line in lines) == 3  # torch.compile is not rehearsed here
    slow = recorded(bench, setup, 1e-3)
    assert any(target.line(slow).startswith("MISSED") for target in bench.report_gpu.targets())
    # other tables do not see these rows
    assert bench.report.report(rows) == ""
    assert bench.report.evolution_report(rows) == ""


def test_without_rows_the_readme_says_so(bench: SimpleNamespace) -> None:
    report = bench.report
    assert bench.report_gpu.report([]).startswith("The GPU kernels have not run on hardware yet")
    markers = f"{report.BEGIN}\n{report.END}\n{report.GPU_BEGIN}\nold\n{report.GPU_END}\n"
    assert "have not run on hardware yet" in report.with_tables(markers, [])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert report.GPU_BEGIN in readme


def test_the_results_file_is_called_after_the_gpu(bench: SimpleNamespace) -> None:
    assert bench.measure.slug("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"
    assert bench.measure.Provenance.of(CPU, "abc-dirty").dirty
    assert bench.measure.Provenance.of(CPU, None).name == bench.record.processor()

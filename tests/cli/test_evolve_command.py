"""`cortexloop evolve` as a user runs it: its files against the engine's numbers, resuming, comparisons, bad input."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import os
import re
import signal
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import cortexloop as cl
from cortexloop import evolve
from cortexloop.cli import charts
from cortexloop.cli.app import run
from cortexloop.cli.evolution import compare as comparison
from cortexloop.cli.evolution import run as running
from cortexloop.textbook import procedural_images, textbook_neurons

TINY = ("--population", "4", "--generations", "3", "--dim", "48")
CHOSEN = (0, 7)


def cortexloop(*arguments):
    """Run in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def evolved(out, *arguments, code=0):
    """Run `cortexloop evolve --json` into a folder; the printed document."""
    found, printed, err = cortexloop("evolve", "--out", out, "--json", *arguments)
    assert found == code, err
    return json.loads(printed) if printed else None


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So few images leave several threads of torch waiting for each other; no number depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "bank.safetensors"
    cl.ModelBank.from_weights(textbook_neurons()[i] for i in CHOSEN).save(path)
    return path


@pytest.fixture(scope="module")
def bank(models):
    return cl.ModelBank.load(models)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "natural.npy"
    np.save(path, procedural_images(24, seed=3))
    return path


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(rows, name):
    return np.array([math.nan if row[name] == "" else float(row[name]) for row in rows])


def grey_response(bank):
    """float32 [N]"""
    return cl.responses(np.full((1, bank.height, bank.width, 3), 128, np.uint8), bank)[0]


def by_hand(bank, *, optimiser, noise, streams, generations=3, population=4, dim=48, **more):
    """The same evolutions from the parts of `cortexloop.evolve`, one neuron and seed after the other."""
    found = []
    for i, stream in enumerate(streams):
        evolution = evolve.Evolution(
            evolve.BankObjective(bank, [n := i * len(bank) // len(streams)], baseline=grey_response(bank)[n : n + 1]),
            evolve.OPTIMISERS[optimiser](
                dim, problems=[stream], population=population, generations=generations, seed=0
            ),
            evolve.GENERATORS["fourier"](bank.height, bank.width, dim=dim),
            noise=evolve.MultiplicativeNoise(noise) if noise else None,
            **more,
        )
        evolution.run(generations)
        found.append(evolution)
    return found


# --------------------------------------------------------------------------------------------------- the files


def test_files_hold_the_numbers_of_the_engine(tmp_path, models, bank):
    out = tmp_path / "run"
    arguments = ("--models", models, "--seeds", 2, "--seed", 5, "--noise", "0.3", "--repeats", 2, *TINY)
    document = evolved(out, *arguments)
    assert sorted(os.listdir(out)) == ["codes.npz", "generations.csv", "images", "report.html", "run.json"]
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["settings"]["population"] == 4
    assert record["streams"] == [running.stream_id(name, seed) for name in bank.names for seed in (5, 6)]
    runs = by_hand(bank, optimiser="cholesky-cma", noise=0.3, streams=record["streams"], repeats=2)

    rows = read_csv(out / "generations.csv")
    keys = [(r["optimiser"], r["noise"], r["neuron"], r["seed"], r["generation"]) for r in rows]
    expected = [("cholesky-cma", "0.3", n, str(s), str(g)) for n in bank.names for s in (5, 6) for g in range(3)]
    assert keys == expected
    history = [generation for evolution in runs for generation in evolution.history]
    grey = grey_response(bank).astype(np.float64)
    above = np.repeat(grey, 6)  # scores are counted from the response to a grey screen, the table has responses
    numbers = {
        "mean": [g.scores.mean() for g in history] + above,
        "min": [g.scores.min() for g in history] + above,
        "max": [g.scores.max() for g in history] + above,
        "clean_mean": [g.clean.mean() for g in history] + above,
        "clean_min": [g.clean.min() for g in history] + above,
        "clean_max": [g.clean.max() for g in history] + above,
        "code_norm": [g.code_norm[0] for g in history],
    }
    for name, values in numbers.items():
        np.testing.assert_allclose(column(rows, name), values, rtol=1e-8, err_msg=name)
    assert {row["reference_mean"] for row in rows} == {""}

    with np.load(out / "codes.npz", allow_pickle=False) as codes:
        assert codes["neuron"].tolist() == [name for name in bank.names for _ in range(2)]
        assert codes["seed"].tolist() == [5, 6, 5, 6]
        assert set(codes["optimiser"]) == {"cholesky-cma"}
        assert set(codes["noise"]) == {0.3}
        np.testing.assert_array_equal(codes["best"], torch.cat([e.optimiser.best.codes for e in runs]).numpy())
        np.testing.assert_array_equal(codes["final"], torch.cat([e.optimiser.centre for e in runs]).numpy())
        np.testing.assert_array_equal(
            codes["best_score"], [float(e.optimiser.best.scores) + grey[i // 2] for i, e in enumerate(runs)]
        )
        responses = codes["best_response"]
    names = sorted(os.listdir(out / "images"))
    assert len(names) == 4
    for i, (name, evolution) in enumerate(zip(names, runs, strict=True)):
        pixels = np.asarray(Image.open(out / "images" / name))
        np.testing.assert_array_equal(pixels, evolution.render(evolution.optimiser.best.codes)[0].numpy())
        assert cl.responses(pixels[None], bank)[0, i // 2] == responses[i]
    assert document["evolutions"] == 4
    assert document["speed"]["generations_per_second"] > 0


def test_a_neuron_evolves_alike_alone_and_among_others(tmp_path, models, bank):
    """And whatever the size of the groups."""
    evolved(tmp_path / "all", "--models", models, "--seeds", 2, *TINY)
    evolved(tmp_path / "one", "--models", models, "--neurons", bank.names[1], "--seed", 1, *TINY)
    everything = read_csv(tmp_path / "all" / "generations.csv")
    alone = read_csv(tmp_path / "one" / "generations.csv")
    assert alone == [row for row in everything if row["neuron"] == bank.names[1] and row["seed"] == "1"]


def test_groups_change_nothing(tmp_path, models, monkeypatch):
    arguments = ("--models", models, "--seeds", 2, "--noise", "0.2", *TINY)
    evolved(tmp_path / "together", *arguments)
    monkeypatch.setattr(running, "GROUP", 3)
    evolved(tmp_path / "apart", *arguments)
    assert json.loads((tmp_path / "apart" / "run.json").read_text())["group"] == 3
    assert_same_results(tmp_path / "together", tmp_path / "apart")


def assert_same_results(a, b):
    for name in ("generations.csv", "codes.npz"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert sorted(os.listdir(a / "images")) == sorted(os.listdir(b / "images"))
    for name in os.listdir(a / "images"):
        assert (a / "images" / name).read_bytes() == (b / "images" / name).read_bytes()


def test_parquet_holds_the_same_table(tmp_path, models):
    parquet = pytest.importorskip("pyarrow.parquet")
    evolved(tmp_path / "run", "--models", models, "--parquet", *TINY)
    rows = read_csv(tmp_path / "run" / "generations.csv")
    table = parquet.read_table(tmp_path / "run" / "generations.parquet")
    assert table.column_names == list(rows[0])
    assert table.column("neuron").to_pylist() == [row["neuron"] for row in rows]
    assert table.column("reference_mean").null_count == len(rows)
    np.testing.assert_allclose(table.column("clean_max").to_numpy(), column(rows, "clean_max"), rtol=1e-8)


def test_names_of_any_kind_stay_in_the_folder(tmp_path):
    first, second = textbook_neurons()[:2]
    names = ("../../up/a:b", "..\\..\\up\\a*b", "", "/" + 200 * "x", "\N{GREEK SMALL LETTER ALPHA}")
    weights = [replace((first, second)[i % 2], name=name) for i, name in enumerate(names) if name]
    cl.ModelBank.from_weights(weights).save(tmp_path / "odd.safetensors")
    evolved(tmp_path / "run", "--models", tmp_path / "odd.safetensors", *TINY)
    assert sorted(os.listdir(tmp_path)) == ["odd.safetensors", "run"]
    files = os.listdir(tmp_path / "run" / "images")
    assert len(files) == len(weights)
    assert all(re.fullmatch(r"\d{3}_[A-Za-z0-9_+.=-]{1,140}\.png", name) for name in files), files


def test_minimising_looks_for_weak_responses(tmp_path, models, images):
    document = evolved(tmp_path / "run", "--models", models, "--minimise", "--images", images, *TINY)
    rows = read_csv(tmp_path / "run" / "generations.csv")
    for neuron in document["neurons"]:
        own = [row for row in rows if row["neuron"] == neuron["name"]]
        assert neuron["best"] == pytest.approx(column(own, "clean_min").min(), rel=1e-6)
    assert "weakest response" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_references_are_scored_in_every_generation(tmp_path, models, bank):
    pixels = procedural_images(5, seed=9)
    np.save(tmp_path / "references.npy", pixels)
    evolved(tmp_path / "run", "--models", models, "--references", tmp_path / "references.npy", *TINY)
    rows = read_csv(tmp_path / "run" / "generations.csv")
    expected = np.repeat(cl.responses(pixels, bank).astype(np.float64).mean(axis=0), 3)
    np.testing.assert_allclose(column(rows, "reference_mean"), expected, rtol=1e-6)


def test_baseline_changes_noisy_scores_alone(tmp_path, models):
    arguments = ("--models", models, "--noise", "0,0.5", *TINY)
    evolved(tmp_path / "grey", *arguments)
    evolved(tmp_path / "none", *arguments, "--baseline", "none")
    grey, none = (read_csv(tmp_path / name / "generations.csv") for name in ("grey", "none"))
    for name in ("clean_mean", "mean"):
        for noise, same in (("0", True), ("0.5", False)):
            # The first generation is the same, and without noise all the others.
            chosen = [i for i, row in enumerate(grey) if row["noise"] == noise and row["generation"] == "0"]
            close = np.isclose(column(grey, name)[chosen], column(none, name)[chosen], rtol=1e-5)
            assert close.all() == (same or name == "clean_mean")


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({1: [9.0], 3: [4.0]}, 3),
        ({1: [9.0], 3: [5.0]}, 1),
        ({1: [9.0], 3: [1.0, 1.0, 1.0, 1.0, 600.0]}, 1),  # fast most of the time
    ],
)
def test_torch_gets_one_thread_unless_more_are_always_faster(monkeypatch, seconds, chosen):
    """By a clock that only the generator moves."""
    now = 0.0

    def generator(codes):
        nonlocal now
        series = seconds[torch.get_num_threads()]
        series.append(series.pop(0))
        now += series[-1]

    generator.dim = 8
    monkeypatch.setattr(running.time, "perf_counter", lambda: now)
    before = torch.get_num_threads()
    with running.torch_threads(3):
        running.settle_torch_threads(generator)
        assert torch.get_num_threads() == chosen
    assert torch.get_num_threads() == before


def test_number_of_threads_changes_nothing(tmp_path, models, restore_threads):
    evolved(tmp_path / "two", "--models", models, "--threads", 2, *TINY)
    evolved(tmp_path / "one", "--models", models, "--threads", 1, *TINY)
    assert json.loads((tmp_path / "one" / "run.json").read_text())["machine"]["torch_threads"] == 1
    assert_same_results(tmp_path / "one", tmp_path / "two")


# ------------------------------------------------------------------------------------------------------ resuming


def interrupt_at(monkeypatch, step, *, times=1):
    """Press Ctrl-C during one of the steps, counted from 1 over the whole run."""
    original, count = evolve.Evolution.step, 0

    def pressed(self):
        nonlocal count
        count += 1
        generation = original(self)
        if count == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return generation

    monkeypatch.setattr(evolve.Evolution, "step", pressed)


@pytest.mark.parametrize(("step", "times"), [(2, 1), (5, 1), (9, 1), (3, 2), (8, 2)])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, models, monkeypatch, step, times):
    arguments = (
        "--models", models, "--noise", "0,0.5", "--population", 4, "--generations", 5, "--dim", 48,
        "--checkpoint-every", 2,
    )  # fmt: skip
    evolved(tmp_path / "whole", *arguments)
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, times=times)
        code, out, err = cortexloop("evolve", "--out", tmp_path / "parts", *arguments)
    assert code == 130
    assert out == ""
    assert "interrupted; continue with: cortexloop evolve --resume --out" in err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["status"] == "interrupted"
    assert not (tmp_path / "parts" / "report.html").exists()
    steps = 0
    original = evolve.Evolution.step

    def counted(self):
        nonlocal steps
        steps += 1
        return original(self)

    monkeypatch.setattr(evolve.Evolution, "step", counted)
    evolved(tmp_path / "parts", "--resume")
    # Softly stopped, nothing is computed twice; stopped at once, at most what came after the last checkpoint.
    assert steps <= 10 - step + (0 if times == 1 else 2)
    assert_same_results(tmp_path / "whole", tmp_path / "parts")
    assert not (tmp_path / "parts" / "checkpoint").exists()
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["status"] == "complete"


@pytest.fixture
def stopped(tmp_path, models, monkeypatch):
    """A run that was interrupted after its first generation."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1)
        assert cortexloop("evolve", "--out", tmp_path / "run", "--models", models, *TINY)[0] == 130
    return tmp_path / "run"


def assert_refused(result, pattern):
    """Exit code 2 and a single line on stderr, nothing on stdout."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert re.search(pattern, err), err


OTHER = {
    "population": (["--population", "8"], "--population is 4 in the run in '.*' and 8 here"),
    "generations": (["--generations", "9"], "--generations is 3 in the run .* and 9 here"),
    "evaluations": (["--evaluations", "40"], "--generations is 3 in the run .* and 10 here"),
    "optimiser": (["--optimiser", "diagonal-cma"], "--optimiser is cholesky-cma in the run .* and diagonal-cma here"),
    "noise": (["--noise", "0,0.2"], "--noise is 0 in the run .* and 0,0.2 here"),
    "seed": (["--seed", "1"], "--seed is 0 in the run .* and 1 here"),
    "neurons": (["--neurons", "0"], "the models differ from those of the run"),
    "backend": (["--backend", "reference"], "the backends differ"),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_run_is_resumed_with_its_own_settings_only(stopped, case):
    extra, pattern = OTHER[case]
    if case == "backend" and cl.explain("bank_forward").chosen == "reference":
        pytest.skip("the C++ kernels are not here")
    before = sorted(os.listdir(stopped))
    assert_refused(cortexloop("evolve", "--resume", "--out", stopped, *extra), pattern)
    assert sorted(os.listdir(stopped)) == before


def test_settings_may_be_repeated_and_what_changes_no_number_may_change(stopped, models, images):
    document = evolved(stopped, "--resume", "--models", models, *TINY, "--images", images, "--checkpoint-every", 1)
    assert document["natural"]["images"] == 24


def test_other_models_under_the_same_path_are_refused(stopped, models, tmp_path):
    cl.ModelBank.from_weights(textbook_neurons()[i] for i in (1, 7)).save(tmp_path / "other.safetensors")
    result = cortexloop("evolve", "--resume", "--out", stopped, "--models", tmp_path / "other.safetensors")
    assert_refused(result, "the models differ from those of the run")


def test_a_folder_with_a_run_is_left_alone(stopped, models):
    before = (stopped / "run.json").read_bytes()
    assert_refused(cortexloop("evolve", "--out", stopped, *TINY), "holds another run: --resume continues it")
    assert (stopped / "run.json").read_bytes() == before
    evolved(stopped, "--resume")
    assert_refused(cortexloop("evolve", "--out", stopped, *TINY), "holds another run")
    code, out, err = cortexloop("evolve", "--resume", "--out", stopped)
    assert (code, out) == (0, "")
    assert "is complete" in err


def test_a_folder_with_other_files_of_the_same_names_is_left_alone(tmp_path):
    (tmp_path / "report.html").write_text("of a demo")
    assert_refused(cortexloop("evolve", "--out", tmp_path, *TINY), "holds another run")
    assert os.listdir(tmp_path) == ["report.html"]


def test_damaged_records_and_parts_are_named(stopped):
    state = next((stopped / "checkpoint").glob("state-*"))
    content = state.read_bytes()
    state.write_bytes(content[: len(content) // 2])
    assert_refused(cortexloop("evolve", "--resume", "--out", stopped), "state-000-0000")
    (stopped / "run.json").write_text("{")
    assert_refused(cortexloop("evolve", "--resume", "--out", stopped), r"run\.json' is no readable record")
    (stopped / "run.json").write_text('{"format": 99}')
    assert_refused(cortexloop("evolve", "--resume", "--out", stopped), "another version")


# --------------------------------------------------------------------------------------------------- comparisons


COMPARED = ("--optimiser", "cholesky-cma,ga-ponce2019", "--noise", "0,0.5", "--seeds", 2)


def test_comparison_against_an_independent_calculation(tmp_path, models, bank):
    out = tmp_path / "run"
    document = evolved(out, "--models", models, *COMPARED, "--seed", 3, *TINY)
    rows = read_csv(out / "generations.csv")
    grey = dict(zip(bank.names, grey_response(bank), strict=True))
    peak = {
        name: max(float(row["clean_max"]) for row in rows if row["neuron"] == name) - grey[name] for name in bank.names
    }

    def score(name, optimiser, noise, measure):
        values = []
        for seed in ("3", "4"):
            own = [
                row
                for row in rows
                if (row["neuron"], row["optimiser"], row["noise"], row["seed"]) == (name, optimiser, noise, seed)
            ]
            best = max(float(row["clean_max"]) for row in own)
            values.append(((float(own[-1]["clean_mean"]) if measure == "final" else best) - grey[name]) / peak[name])
        return sum(values) / 2

    table = read_csv(out / "comparison.csv")
    assert len(table) == 2 * 3 * 2
    draws = np.random.default_rng(3).integers(0, 2, size=(10_000, 2))
    for row in table:
        levels = ("0", "0.5") if row["noise"] == "all" else (row["noise"],)
        own, genetic = (
            np.array([np.mean([score(name, o, level, row["measure"]) for level in levels]) for name in bank.names])
            for o in (row["optimiser"], "ga-ponce2019")
        )
        assert float(row["score"]) == pytest.approx(own.mean(), rel=1e-5)
        resampled = own[draws].mean(axis=1)
        expected = np.percentile(resampled, [2.5, 97.5])
        np.testing.assert_allclose([float(row["score_low"]), float(row["score_high"])], expected, rtol=1e-5)
        if row["optimiser"] == "ga-ponce2019":
            assert (row["ratio"], row["ratio_low"]) == ("1", "")
        elif np.percentile(genetic[draws].mean(axis=1), 2.5) <= 0:
            assert (row["ratio"], row["ratio_low"]) == ("", "")
        else:
            assert float(row["ratio"]) == pytest.approx(own.mean() / genetic.mean(), rel=1e-5)
            expected = np.percentile(resampled / genetic[draws].mean(axis=1), [2.5, 97.5])
            np.testing.assert_allclose([float(row["ratio_low"]), float(row["ratio_high"])], expected, rtol=1e-5)
        assert (row["ratio_to"], row["neurons"]) == ("ga-ponce2019", "2")
    assert max(float(row["score"]) for row in table if row["measure"] == "best") <= 1
    printed = {(e["optimiser"], e["noise"]): e["score"] for e in document["comparison"]["final"]}
    assert printed["cholesky-cma", "all"] == pytest.approx(float(table[4]["score"]), rel=1e-6)
    assert document["comparison"]["ratio_to"] == "ga-ponce2019"
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "Optimisers compared" in html
    assert "largest such response to any image of any run" in html


def test_comparison_is_printed_as_a_table(tmp_path, models):
    code, out, err = cortexloop("evolve", "--out", tmp_path / "run", "--models", models, *COMPARED, *TINY)
    assert code == 0, err
    for text in ("normalised score", "ga-ponce2019", "noise 0.5", "bootstrap", "report:"):
        assert text in out


def test_neurons_that_nothing_drives_are_left_out_and_named():
    conditions = [("a", 0.0), ("b", 0.0)]
    final = np.array([[[1.0], [-3.0], [2.0]], [[3.0], [-2.0], [4.0]]])
    found = comparison.compare(conditions, final, final + 1, np.array([0.0, 0.0, 1.0]), seed=0)
    assert (found.neurons, found.apart, found.genetic) == (2, (1,), None)
    scores = {entry.optimiser: entry.score.value for entry in found.final}
    assert scores == {"a": pytest.approx((1 / 4 + 1 / 4) / 2), "b": pytest.approx((3 / 4 + 3 / 4) / 2)}
    assert [entry.score.value for entry in found.best][1] == pytest.approx(1.0)
    assert found.final[0].ratio is None


def test_there_is_no_ratio_to_what_may_be_zero(rng):
    conditions = [("ga-xdream", 0.0), ("nes", 0.0)]
    final = np.stack([np.array([[0.1], [0.3], [-0.2]]), rng.uniform(1, 2, (3, 1))])
    found = comparison.compare(conditions, final, np.full((2, 3, 1), 2.0), np.zeros(3), seed=0).final
    assert found[0].ratio == comparison.Estimate(1.0, found[0].ratio.low, found[0].ratio.high)
    assert math.isnan(found[1].ratio.value)
    assert math.isnan(found[1].ratio.low)
    assert not math.isnan(found[1].score.low)


def test_one_neuron_has_no_interval():
    found = comparison.compare([("a", 0.0), ("b", 0.0)], np.ones((2, 1, 1)), np.ones((2, 1, 1)), np.zeros(1), seed=0)
    assert math.isnan(found.final[0].score.low)
    assert found.final[0].score.value == 1.0


def test_normalising_mirrors_when_minimising(rng):
    response, peak, grey = rng.normal(size=(2, 3, 2)), rng.normal(size=(2, 3, 2)) + 4, rng.normal(size=3)
    np.testing.assert_allclose(
        comparison.normalise(-response, -peak, -grey, minimise=True), comparison.normalise(response, peak, grey)
    )


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (5, 5), (3, 8), (102, 122)])
def test_wilson_interval(successes, trials):
    stats = pytest.importorskip("scipy.stats")
    found = comparison.wilson(successes, trials)
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert found.value == successes / trials


# ------------------------------------------------------------------------------------------------ natural images


def test_evolved_against_natural_images(tmp_path, models, bank, images):
    out = tmp_path / "run"
    document = evolved(out, "--models", models, "--images", images, "--seeds", 3, *TINY)
    natural = cl.responses(np.load(images), bank)
    table = read_csv(out / "natural.csv")
    assert [row["image"] for row in table] == [str(i) for i in range(24)]
    np.testing.assert_allclose(np.stack([column(table, name) for name in bank.names], 1), natural, rtol=1e-8)
    grey = grey_response(bank).astype(float)
    rows = read_csv(out / "generations.csv")
    best = np.array(
        [
            [
                column([r for r in rows if (r["neuron"], r["seed"]) == (n, s)], "clean_max").max()
                for s in ("0", "1", "2")
            ]
            for n in bank.names
        ]
    )
    typical, all_runs = document["natural"]["evolved_to_natural"]
    for found, evolved_best in ((typical, np.median(best, 1)), (all_runs, best.max(1))):
        ratios = (evolved_best - grey) / (natural.max(axis=0) - grey)
        assert found["median_ratio"] == pytest.approx(np.median(ratios), rel=1e-5)
        assert found["exceeding"] == (ratios > 1).sum()
        assert found["fraction_interval"] == pytest.approx(
            [comparison.wilson(found["exceeding"], 2).low, comparison.wilson(found["exceeding"], 2).high]
        )
        assert found["without_ratio"] == []
    for n, neuron in enumerate(document["neurons"]):
        assert neuron["best_natural"]["name"] == str(natural[:, n].argmax())
        assert neuron["ratio"] == pytest.approx((best[n].max() - grey[n]) / (natural[:, n].max() - grey[n]), rel=1e-5)
    assert_self_contained((out / "report.html").read_text(encoding="utf-8"))


def test_neurons_without_a_natural_response_above_grey_are_listed_apart(tmp_path, models, bank):
    np.save(tmp_path / "grey.npy", np.full((2, 112, 112, 3), 128, np.uint8))
    document = evolved(tmp_path / "run", "--models", models, "--images", tmp_path / "grey.npy", *TINY)
    (found,) = document["natural"]["evolved_to_natural"]
    assert found["without_ratio"] == list(bank.names)
    assert (found["neurons"], found["fraction"], found["median_ratio"]) == (0, None, None)
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert re.search(f"no natural image drives them above grey: {', '.join(bank.names)}", html)
    code, out, _ = cortexloop(
        "evolve", "--out", tmp_path / "again", "--models", models, "--images", tmp_path / "grey.npy", *TINY
    )
    assert code == 0
    assert "nothing to compare evolved images with" in out


def test_bad_natural_images_are_refused_before_anything_is_evolved(tmp_path, models):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, pixels in enumerate(procedural_images(3, seed=1)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "1.png").write_bytes(b"no picture")
    arguments = ("--out", tmp_path / "run", "--models", models, "--images", folder, *TINY)
    assert_refused(cortexloop("evolve", *arguments), r"image '1\.png': is not a picture")
    assert not (tmp_path / "run").exists()
    document = evolved(*arguments[1:], "--skip-bad")
    assert [s["name"] for s in document["natural"]["skipped"]] == ["1.png"]
    assert "Images left out" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


# ----------------------------------------------------------------------------------------------------- the report


class Tags(HTMLParser):
    """Whether every element is closed, and what is in the page."""

    VOID = ("meta", "img", "br", "wbr")

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.ids, self.targets = [], [], set(), set()

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        for name, value in attributes:
            if name == "id":
                assert value not in self.ids, f"two elements with id {value}"
                self.ids.add(value)
            if name == "href":
                self.targets.add(value.removeprefix("#"))
        if tag not in self.VOID and tag not in ("path", "i"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        if tag in ("path", "i"):
            return
        assert self.open.pop() == tag


def assert_self_contained(html):
    """Well-formed, and nothing is loaded: every source is inside the page, and no script or address points out."""
    assert html.startswith("<!doctype html>")
    for address in re.findall(r'(?:src|href)="([^"]*)"', html):
        assert address.startswith(("data:image/", "#")), address[:80]
    for forbidden in ("http:", "https:", "<script", "<link", "@import", "url("):
        assert forbidden not in html
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert tags.targets <= tags.ids
    return tags


def test_help_names_every_optimiser_and_generator(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    code, out, _ = cortexloop("evolve", "--help")
    assert code == 0
    names = [*evolve.OPTIMISERS, *(name for name in evolve.GENERATORS if not name.startswith("deepsim")), "deepsim-fc6"]
    assert [name for name in names if name not in out] == []


def test_textbook_neurons_without_any_model(tmp_path):
    code, out, err = cortexloop("evolve", "--out", tmp_path / "run", "--neurons", "dot*", *TINY)
    assert code == 0, err
    assert err == ""
    for text in ("dot_small", "generations/s", "report:", "cpu backend" if "cpu" in out else "reference backend"):
        assert text in out
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    tags = assert_self_contained(html)
    assert tags.seen.count("article") == 2
    for text in ("a small dot, light or dark", "Norm of the codes", "generation 2", "final estimate", "run.json"):
        assert text in html


def test_report_of_many_conditions_and_seeds(tmp_path, models, images):
    optimisers = list(evolve.OPTIMISERS)
    document = evolved(
        tmp_path / "run", "--models", models, "--images", images, "--optimiser", "all", "--noise", "0,0.2,0.5",
        "--seeds", 2, "--show", 1, *TINY,
    )  # fmt: skip
    assert document["evolutions"] == 3 * len(optimisers) * 2 * 2
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    tags = assert_self_contained(html)
    assert tags.seen.count("article") == 1
    assert "The first 1 of 2 models" in html
    for name in optimisers:
        assert html.count(f"</i>{name}</span>") == 1


def test_odd_names_are_escaped(tmp_path):
    weights = replace(textbook_neurons()[0], name="<b>&\"'")
    cl.ModelBank.from_weights([weights]).save(tmp_path / "odd.safetensors")
    code, out, err = cortexloop("evolve", "--out", tmp_path / "run", "--models", tmp_path / "odd.safetensors", *TINY)
    assert code == 0, err
    assert "<b>&" in out
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<b>&" not in html
    assert_self_contained(html)


def test_a_band_lies_between_its_bounds_and_intervals_on_their_rows():
    x, y = np.arange(3.0), np.array([1.0, 3.0, 2.0])
    svg = charts.line_chart([charts.Series(x, y, "curve-c", y - 1, y + 2)], "generation", "response")
    bands = re.findall(r'd="([^"]*)" style="fill: var\(--curve-c\); opacity', svg)
    lines = re.findall(r'd="([^"]*)" style="fill: none; stroke: var\(--curve-c\)', svg)
    assert len(bands) == len(lines) == 1
    band, line = (np.array(re.findall(r"[ML] (\S+) (\S+)", d), float) for d in (bands[0], lines[0]))
    unit = (line[0, 1] - line[1, 1]) / 2
    np.testing.assert_allclose(band[:3, 1], line[:, 1] + unit, atol=0.05)
    np.testing.assert_allclose(band[3:, 1], line[::-1, 1] - 2 * unit, atol=0.05)

    rows = ["first", "second"]
    intervals = [charts.Interval(0, 0.4, 0.2, 0.5), charts.Interval(1, 0.8, math.nan, math.nan, "b")]
    svg = charts.interval_chart(rows, intervals, "score")
    heights = {text: float(y) for y, text in re.findall(r'y="([\d.]+)"[^>]*>(first|second)<', svg)}
    spans = re.findall(r'd="M (\S+) (\S+) L (\S+) \S+" style="[^"]*stroke: var\(--(a|b)\)[^"]*stroke-width: 7', svg)
    assert [span[3] for span in spans] == ["a", "b"]
    assert float(spans[0][0]) < float(spans[1][0])
    for span, row in zip(spans, rows, strict=True):
        assert float(span[1]) == pytest.approx(heights[row], abs=6)
    assert svg.count("stroke-opacity: 0.55") == 1


# ------------------------------------------------------------------------------------------------------- bad input

BAD = {
    "optimiser": (["--optimiser", "magic"], "--optimiser should be all or one or several of .*cholesky-cma.*'magic'"),
    "optimiser twice": (["--optimiser", "cholesky-cma,cholesky-cma"], "--optimiser names the same thing twice"),
    "generator": (["--generator", "gan"], "--generator should be one of .*fourier.*'gan'"),
    "weights without deepsim": (["--weights", "x.pt"], "--generator fourier takes no --weights"),
    "deepsim without weights": (["--generator", "deepsim-fc6"], "needs --weights"),
    "missing weights": (["--generator", "deepsim-fc6", "--weights", "{tmp}/none.pt", "--dim", "+"], "none.pt"),
    "dim of deepsim": (["--generator", "deepsim-fc6", "--weights", "x", "--dim", "9"], "codes of fixed length"),
    "population": (["--population", "1"], "--population should be at least 2, got 1"),
    "generations": (["--generations", "0"], "--generations should be at least 1"),
    "both lengths": (["--evaluations", "100"], "--generations and --evaluations say the same thing twice"),
    "evaluations": (["--generations", "+", "--evaluations", "3"], "--evaluations should be at least 4, the population"),
    "seeds": (["--seeds", "0"], "--seeds should be at least 1"),
    "seed": (["--seed", "-1"], "--seed should be at least 0"),
    "repeats": (["--repeats", "0"], "--repeats should be at least 1"),
    "show": (["--show", "0"], "--show should be at least 1"),
    "checkpoints": (["--checkpoint-every", "0"], "--checkpoint-every should be at least 1"),
    "noise": (["--noise", "0,-1"], "--noise should be numbers from 0 on, separated by commas, got '0,-1'"),
    "noise in words": (["--noise", "much"], "--noise should be numbers"),
    "noise twice": (["--noise", "0,0.0"], "--noise names the same thing twice"),
    "noise model": (["--noise-model", "pink"], "--noise-model should be multiplicative or poisson, got 'pink'"),
    "poisson": (["--noise-model", "poisson"], "needs --spikes-per-unit"),
    "poisson and noise": (["--noise-model", "poisson", "--noise", "1"], "--noise belongs to --noise-model mult"),
    "spikes alone": (["--spikes-per-unit", "5"], "--spikes-per-unit belongs to --noise-model poisson"),
    "spikes": (["--noise-model", "poisson", "--spikes-per-unit", "0"], "--spikes-per-unit should be positive"),
    "size alone": (["--size", "2"], "--size and --pixels-per-degree belong together"),
    "position alone": (["--position", "1,1"], "--position needs --size and --pixels-per-degree"),
    "position": (["--size", "2", "--pixels-per-degree", "20", "--position", "1"], "--position should be .*, got '1'"),
    "size": (["--size", "-2", "--pixels-per-degree", "20"], "--size should be a positive number, got -2"),
    "baseline": (["--baseline", "black"], "--baseline should be grey or none, got 'black'"),
    "precision": (["--precision", "vague"], "--precision should be exact or fast"),
    "backend": (["--backend", "abacus"], "backend should be one of .*'abacus'"),
    "threads": (["--threads", "0"], "threads should be at least 1"),
    "missing models": (["--models", "{tmp}/nowhere"], "nowhere"),
    "unknown neuron": (["--neurons", "nobody"], "'nobody' matches none of the 9 models"),
    "missing images": (["--images", "{tmp}/nowhere"], "no such file or folder of images"),
    "missing references": (["--references", "{tmp}/nowhere"], "no such file or folder of images"),
    "other size": (["--references", "{tmp}/small.npy"], "64 x 64 pixels .* expected 112 x 112"),
    "out is a file": (["--out", "{tmp}/small.npy"], "is a file; give a folder"),
    "nothing to resume": (["--resume"], "no run to resume in '.*'; leave out --resume"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, case):
    np.save(tmp_path / "small.npy", np.zeros((2, 64, 64, 3), np.uint8))
    arguments = dict(zip(TINY[::2], TINY[1::2], strict=True)) | {"--out": str(tmp_path / "run")}
    extra, pattern = BAD[case]
    rest = [text.format(tmp=tmp_path) for text in extra]
    while rest:
        name = rest.pop(0)
        arguments[name] = rest.pop(0) if rest and not rest[0].startswith("--") else None
    if "deepsim-fc6" in arguments.values() and case != "dim of deepsim":
        arguments["--dim"] = "+"
    flat = []
    for name, value in arguments.items():
        if value != "+":  # an option to leave out
            flat += [name] if value is None else [name, value]
    assert_refused(cortexloop("evolve", *flat), pattern)
    assert os.listdir(tmp_path) == ["small.npy"]


def test_poisson_noise(tmp_path, models, bank):
    np.save(tmp_path / "references.npy", procedural_images(8, seed=0))
    arguments = ("--models", models, "--references", tmp_path / "references.npy", "--noise-model", "poisson", *TINY)
    evolved(tmp_path / "run", *arguments, "--spikes-per-unit", "5,inf")
    rows = read_csv(tmp_path / "run" / "generations.csv")
    assert {row["noise"] for row in rows} == {"5", "inf"}
    quiet = [row for row in rows if row["noise"] == "inf"]
    assert [row["max"] for row in quiet] == [row["clean_max"] for row in quiet]
    noisy = [row for row in rows if row["noise"] == "5"]
    grey = np.repeat(grey_response(bank).astype(float), 3)
    for counts in (5 * (column(noisy, "max") - grey), 8 * 5 * (column(noisy, "reference_mean") - grey)):
        np.testing.assert_allclose(counts, np.round(counts), atol=1e-4)
        assert counts.max() > 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["noise"] == [5.0, "inf"]
    result = cortexloop("evolve", "--out", tmp_path / "loud", *arguments, "--spikes-per-unit", "1e9")
    assert_refused(result, "spikes per presentation, more than")


def test_placed_images_lie_on_grey(tmp_path, models):
    arguments = ("--models", models, "--size", 2, "--pixels-per-degree", 20, "--position", "0.5,-0.25", *TINY)
    evolved(tmp_path / "run", *arguments)
    top, left, height, width = json.loads((tmp_path / "run" / "run.json").read_text())["placement"]["box"]
    assert (height, width) == (40, 40)
    assert (left + 20, top + 20) == (56 + 10, 56 + 5)
    for name in os.listdir(tmp_path / "run" / "images"):
        pixels = np.asarray(Image.open(tmp_path / "run" / "images" / name))
        inside = np.zeros((112, 112), bool)
        inside[top : top + 40, left : left + 40] = True
        assert (pixels[~inside] == 128).all()
        assert (pixels[inside] != 128).any()


def test_no_space_left_is_one_sentence(tmp_path, models, monkeypatch):
    """At the start nothing remains; later the run can be resumed."""
    arguments = ("--out", tmp_path / "run", "--models", models, *TINY)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert_refused(cortexloop("evolve", *arguments), "no space left on the disk")
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", lambda *_: full(0))
        assert_refused(cortexloop("evolve", *arguments), "[Nn]o space left on")
    assert not (tmp_path / "run" / "report.html").exists()
    evolved(tmp_path / "run", "--resume")
    evolved(tmp_path / "whole", *arguments[2:])
    assert_same_results(tmp_path / "whole", tmp_path / "run")

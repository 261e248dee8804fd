"""`cortexloop fit` as a user runs it: planted readouts are found, files hold the library's numbers, errors are told."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import cortexloop as cl
from cortexloop import metrics
from cortexloop.cli.app import run
from cortexloop.cli.fitting import example
from cortexloop.factor import FactorModel
from cortexloop.textbook import procedural_images

IMAGES, CHANNELS, SIDE, NEURONS = 240, 6, 7, 3
FILES = ["model.safetensors", "neurons.csv", "predictions.csv", "report.html", "run.json"]


def cortexloop(*arguments):
    """Run in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def fitted(out, *arguments):
    """Run `cortexloop fit --json` into a folder; the printed document."""
    code, printed, err = cortexloop("fit", "--out", out, "--json", *arguments)
    assert code == 0, err
    return json.loads(printed)


def refused(*arguments):
    """The sentence with which a fit is refused."""
    code, printed, err = cortexloop("fit", *arguments)
    assert (code, printed) == (2, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Planted:
    """Features and responses of neurons that read a known place and known channels, with a little noise."""

    def __init__(self, folder):
        rng = np.random.default_rng(4)
        self.features = rng.gamma(2.0, size=(IMAGES, CHANNELS, SIDE, SIDE)).astype(np.float32)
        self.places = [(2, 3), (4, 4), (3, 2)]
        self.channels = [0, 3, 5]
        clean = np.stack(
            [
                self.features[:, c, y : y + 2, x : x + 2].mean((1, 2))
                for c, (y, x) in zip(self.channels, self.places, strict=True)
            ]
        )
        self.raw = clean[..., None] + rng.normal(0, 0.15, (NEURONS, IMAGES, 4))
        self.features_file, self.responses_file = folder / "features.npy", folder / "responses.npz"
        np.save(self.features_file, self.features)
        np.savez(self.responses_file, **{"raw/day": self.raw})
        self.arguments = ("--features", self.features_file, "--responses", self.responses_file, "--rank", 1)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return Planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def found(planted, tmp_path_factory):
    """A fit of the planted neurons: (folder, printed document)."""
    out = tmp_path_factory.mktemp("fit") / "out"
    return out, fitted(out, *planted.arguments, "--border", 0, "--baselines", "pca,dense-ridge")


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(rows, name):
    return np.array([math.nan if row[name] == "" else float(row[name]) for row in rows])


class Page(HTMLParser):
    """Tags, texts and addresses of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.addresses, self.ids, self.text = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_data(self, data):
        self.text.append(data)


# -------------------------------------------------------------------------------------------------- planted neurons


def test_planted_readouts_are_found(planted, found):
    out, document = found
    assert sorted(os.listdir(out)) == FILES
    model = FactorModel.load(out / "model.safetensors")
    for n, (channel, (y, x)) in enumerate(zip(planted.channels, planted.places, strict=True)):
        assert int(model.factors.vectors[n, 0].argmax()) == channel
        mask = model.factors.masks[n, 0]
        inside = mask[y : y + 2, x : x + 2]
        assert float(inside.square().sum()) > 0.9 * float(mask.square().sum())
    for neuron in document["neurons"]:
        assert neuron["r"] > 0.9 * neuron["ceiling"]
        assert neuron["explained"] > 0.7
    assert document["median_r"]["factors"] > document["median_r"]["pca"]
    assert document["features"] == [CHANNELS, SIDE, SIDE]
    assert document["images"] == {"fitted": 192, "held_out": 48}


def test_files_hold_the_numbers_of_the_library(planted, found):
    out, document = found
    model = FactorModel.load(out / "model.safetensors")
    rows = read_csv(out / "predictions.csv")
    held = column(rows, "held_out") == 1
    assert held.sum() == 48
    assert set(np.flatnonzero(~held)) == set(model.train.tolist())
    names = [neuron["name"] for neuron in document["neurons"]]
    predicted = np.stack([column(rows, f"{name} predicted") for name in names])
    recorded = np.stack([column(rows, f"{name} recorded") for name in names])
    np.testing.assert_allclose(predicted.T, model.predict(planted.features).numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(recorded, planted.raw.mean(-1), rtol=1e-8)

    table = read_csv(out / "neurons.csv")
    assert [row["neuron"] for row in table] == names
    x, y = predicted[:, held], recorded[:, held]
    np.testing.assert_allclose(column(table, "r"), metrics.pearson_r(x, y), rtol=1e-6)
    np.testing.assert_allclose(column(table, "r2"), metrics.coefficient_of_determination(x, y), rtol=1e-6)
    np.testing.assert_allclose(column(table, "fev"), 1 - (y - x).var(1) / y.var(1), rtol=1e-6)
    merits = model.report(planted.features[held], y.T, raw=planted.raw[:, held].transpose(1, 0, 2))
    np.testing.assert_allclose(column(table, "ceiling"), merits["ceiling"], rtol=1e-6)
    np.testing.assert_allclose(column(table, "r_over_ceiling"), merits["normalised"], rtol=1e-5)
    assert model.factors.explained is not None
    np.testing.assert_allclose(column(table, "explained"), model.factors.explained.numpy(), rtol=1e-6)
    np.testing.assert_allclose(column(table, "kept"), model.kept.numpy(), rtol=1e-6)
    record = json.loads((out / "run.json").read_text())
    assert record["options"]["rank"] == 1
    assert record["feature_shape"] == [CHANNELS, SIDE, SIDE]


def test_held_out_responses_have_no_influence(planted, tmp_path):
    models = []
    for place, shift in (("a", 0.0), ("b", 3.0)):
        changed = planted.raw.copy()
        changed[:, 200:] = changed[:, 200:][:, ::-1] + shift
        path = tmp_path / f"{place}.npz"
        np.savez(path, **{"raw/day": changed})
        fitted(
            tmp_path / place, "--features", planted.features_file, "--responses", path, "--held-out-from", 201,
            "--rank", 2, "--border", 0, "--baselines", "none",
        )  # fmt: skip
        models.append(FactorModel.load(tmp_path / place / "model.safetensors"))
    ours, theirs = models
    assert ours.settings == theirs.settings
    for a, b in ((ours.factors, theirs.factors), (ours.readout, theirs.readout)):
        assert torch.equal(a.masks, b.masks)
        assert torch.equal(a.vectors, b.vectors)
    assert torch.equal(ours.intercept, theirs.intercept)


def test_the_report_is_one_page(found):
    page = Page(found[0] / "report.html")
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert {a.removeprefix("#") for a in page.addresses if a.startswith("#")} <= set(page.ids)
    text = " ".join(page.text)
    assert "nan" not in text.lower().split()
    for part in ("Prediction of held-out images", "Receptive field", "Ceiling", "principal components"):
        assert part in text
    assert page.tags.count("article") == NEURONS


@pytest.mark.parametrize(
    "arguments",
    [
        ("--method", "semi-nmf", "--reduction", "none"),
        ("--method", "svd", "--reduction", "vector", "--regressor", "lasso", "--nonlinearity", "softplus"),
        ("--threshold", "fdr:0.01", "--reduction", "factor", "--nonlinearity", "line"),
        ("--threshold", "permutation", "--rank", 2),
        ("--baselines", "pca,srp,dense-ridge,lasso", "--neurons", "1"),
    ],
)
def test_choices(planted, tmp_path, arguments):
    document = fitted(tmp_path / "out", *planted.arguments, "--border", 0, "--baselines", "none", *arguments)
    assert all(neuron["r"] > 0.6 for neuron in document["neurons"])


# ------------------------------------------------------------------------------------------- images and a network


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """40 images in a file, and responses of two neurons that are channels of a bank's layer, in a table."""
    folder = tmp_path_factory.mktemp("recording")
    images = procedural_images(40, 5)
    np.save(folder / "images.npy", images)
    bank = cl.ModelBank.from_weights(cl.textbook.textbook_neurons()[:2])
    bank.save(folder / "bank.safetensors")
    maps = cl.activations(images, bank.select("edge_0deg"), 3)[0]
    values = np.stack([maps[:, 13, 13].sum(-1), maps[:, 8:11, 15:18].sum((1, 2, 3))], 1)
    with (folder / "responses.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "up", "down"])
        writer.writerows([i, *row] for i, row in enumerate(values.tolist()))
    return folder


def test_images_through_a_layer_of_a_bank(recording, tmp_path):
    document = fitted(
        tmp_path / "out", "--images", recording / "images.npy", "--responses", recording / "responses.csv",
        "--models", recording / "bank.safetensors", "--model", "edge_0deg", "--layer", "layer3", "--threshold", "none",
        "--baselines", "none", "--rank", 1, "--device", "cpu",
    )  # fmt: skip
    assert [neuron["name"] for neuron in document["neurons"]] == ["up", "down"]
    assert document["source"] == "edge_0deg.layer3"
    assert "ceiling" not in document["neurons"][0]
    settings = FactorModel.load(tmp_path / "out" / "model.safetensors").settings["fit"]
    assert settings["neurons"] == ["up", "down"]
    assert settings["source"]["models"] == str((recording / "bank.safetensors").resolve())
    page = Page(tmp_path / "out" / "report.html")
    assert "back-projected to pixels" in " ".join(page.text)
    assert any(address.startswith("data:image/jpeg") for address in page.addresses)


def test_the_example_runs_without_arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(example, "IMAGES", 60)
    monkeypatch.chdir(tmp_path)
    code, printed, err = cortexloop("fit", "--baselines", "none", "--show", 2, "--neurons", "0-2")
    assert code == 0, err
    assert sorted(os.listdir("cortexloop-fit")) == FILES
    assert "edge_0deg" in printed
    assert "report: cortexloop-fit/report.html" in printed
    again = refused("--neurons", "0-2")
    assert "--overwrite" in again
    fitted("cortexloop-fit", "--overwrite", "--baselines", "none", "--show", 1, "--neurons", "corner")
    assert Page(tmp_path / "cortexloop-fit" / "report.html").tags.count("article") == 1


def test_collages_hide_what_surrounds_a_piece():
    images = example.collages(4, 3)
    assert images.shape == (4, 112, 112, 3)
    np.testing.assert_array_equal(images, example.collages(4, 3))
    assert not np.array_equal(images, example.collages(4, 4))


# ------------------------------------------------------------------------------------------------- what is left out


def test_neurons_and_images_that_cannot_be_used_are_listed(planted, tmp_path):
    values = planted.raw.mean(-1)
    values = np.concatenate([values, np.full((1, IMAGES), 2.5), np.full((1, IMAGES), np.nan)])
    values[0, 7] = np.nan
    path = tmp_path / "responses.npy"
    np.save(path, values)
    arguments = ("--features", planted.features_file, "--responses", path, "--rank", 1, "--border", 0)
    document = fitted(tmp_path / "a", *arguments, "--baselines", "none")
    reasons = {one["name"]: one["reason"] for one in document["excluded"]}
    assert [neuron["name"] for neuron in document["neurons"]] == ["neuron1", "neuron2"]
    assert "1 of 240 responses are missing" in reasons["neuron0"]
    assert "constant (2.5)" in reasons["neuron3"]
    assert "all NaN" in reasons["neuron4"]
    table = read_csv(tmp_path / "a" / "neurons.csv")
    assert [row["neuron"] for row in table] == ["neuron1", "neuron2", "neuron4", "neuron0", "neuron3"]
    assert [bool(row["excluded"]) for row in table] == [False, False, True, True, True]

    document = fitted(tmp_path / "b", *arguments, "--missing", "images", "--baselines", "none")
    assert [neuron["name"] for neuron in document["neurons"]] == ["neuron0", "neuron1", "neuron2"]
    assert [one["name"] for one in document["dropped_images"]] == ["image 8"]
    assert len(read_csv(tmp_path / "b" / "predictions.csv")) == IMAGES - 1
    text = (tmp_path / "b" / "report.html").read_text()
    assert "image 8" in text
    assert "constant (2.5)" in text


def test_a_neuron_without_significant_features_is_listed(planted, tmp_path):
    values = np.concatenate([planted.raw.mean(-1)[:1], np.random.default_rng(0).normal(size=(1, IMAGES))])
    path = tmp_path / "responses.npy"
    np.save(path, values)
    document = fitted(
        tmp_path / "out", "--features", planted.features_file, "--responses", path, "--rank", 1, "--border", 0,
        "--threshold", "two-sided:4.5", "--baselines", "none", "--reduction", "none",
    )  # fmt: skip
    assert [one["name"] for one in document["excluded"]] == ["neuron1"]
    assert document["neurons"][1]["r"] is None
    assert document["neurons"][0]["r"] > 0.8


def test_dead_features_are_counted(planted, tmp_path):
    features = planted.features.copy()
    features[:, 4] = 0
    np.savez(tmp_path / "maps.npz", features=features, other=np.zeros(3))
    document = fitted(
        tmp_path / "out", "--features", tmp_path / "maps.npz", "--responses", planted.responses_file, "--rank", 1,
        "--border", 0, "--baselines", "none",
    )  # fmt: skip
    assert document["dead_features"] == SIDE * SIDE


# ---------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_told_in_one_sentence(planted, recording, tmp_path):
    images, table = recording / "images.npy", recording / "responses.csv"
    bank = ("--models", recording / "bank.safetensors", "--model", "edge_0deg")
    out = ("--out", tmp_path / "none")
    assert "needs the --responses" in refused("--images", images, *out)
    assert "say what gives the features" in refused("--images", images, "--responses", table, *out)
    assert "--images that they belong to" in refused("--responses", table, *bank, *out)
    assert "layer0, layer1" in refused("--images", images, "--responses", table, *bank, "--layer", "conv9", *out)
    assert "is not in" in refused("--images", images, "--responses", table, *bank[:3], "edge", *out)
    assert "5 images belong" not in refused("--images", tmp_path / "nothing", "--responses", table, *bank, *out)
    few = tmp_path / "few.npy"
    np.save(few, procedural_images(5, 0))
    assert "cannot tell which" in refused("--images", few, "--responses", table, *bank, *out)
    short = tmp_path / "short.npy"
    np.save(short, planted.features[:50])
    assert "50 rows" in refused("--features", short, "--responses", planted.responses_file, *out)
    assert "rank should lie in 1..6" in refused(*planted.arguments, "--rank", 7, *out)
    assert "border" in refused(*planted.arguments, "--border", 4, *out)
    assert "--baselines should be among" in refused(*planted.arguments, "--baselines", "pls", *out)
    assert "--threshold should be one of" in refused(*planted.arguments, "--threshold", "t", *out)
    assert "level behind the colon" in refused(*planted.arguments, "--threshold", "fdr:low", *out)
    assert "between 0 and 1" in refused(*planted.arguments, "--threshold", "fdr:2", *out)
    assert "--method should be one of" in refused(*planted.arguments, "--method", "nmf", *out)
    assert "--held-out is a fraction" in refused(*planted.arguments, "--held-out", 2, *out)
    assert "give one of them" in refused(*planted.arguments, "--held-out", 0.5, "--held-out-from", 3, *out)
    assert "0 are held out" in refused(*planted.arguments, "--held-out-from", 900, *out)
    assert "matches none of the 3 neurons" in refused(*planted.arguments, "--neurons", "x", *out)
    assert "computed already" in refused(*planted.arguments, *bank, *out)
    silent = tmp_path / "silent.npy"
    np.save(silent, np.full((2, IMAGES), np.nan))
    assert "nothing but NaN" in refused("--features", planted.features_file, "--responses", silent, *out)
    constant = tmp_path / "constant.npy"
    np.save(constant, np.ones((2, IMAGES)))
    assert "no neuron can be fitted" in refused("--features", planted.features_file, "--responses", constant, *out)
    spoilt = planted.features.copy()
    spoilt[3, 0, 0, 0] = np.nan
    np.save(tmp_path / "spoilt.npy", spoilt)
    assert "NaN" in refused("--features", tmp_path / "spoilt.npy", "--responses", planted.responses_file, *out)
    (tmp_path / "torn.npy").write_bytes(planted.features_file.read_bytes()[:200])
    assert "readable" in refused("--features", tmp_path / "torn.npy", "--responses", planted.responses_file, *out)
    assert "should hold floating maps" in refused("--features", images, "--responses", planted.responses_file, *out)
    assert not (tmp_path / "none").exists()


def test_nothing_is_left_after_an_interruption(planted, tmp_path, monkeypatch):
    from cortexloop.cli.fitting import command

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "write_tables", interrupted)
    code, _, err = cortexloop("fit", *planted.arguments, "--border", 0, "--baselines", "none", "--out", tmp_path / "x")
    assert code == 130
    assert "nothing was written" in err
    assert not (tmp_path / "x").exists()


def test_earlier_results_survive_a_failure(planted, tmp_path, monkeypatch):
    from cortexloop.cli.fitting import command

    out = tmp_path / "out"
    arguments = (*planted.arguments, "--border", 0, "--baselines", "none", "--out", out)
    assert cortexloop("fit", *arguments)[0] == 0
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "write_tables", full)
    assert "No space left" in refused(*arguments, "--overwrite")
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before

"""The commands as a user runs them: what they write and print, and one sentence with exit code 2 for bad input."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import cortexloop as cl
from cortexloop.cli.app import run
from cortexloop.textbook import procedural_images, textbook_neurons

DATA = Path(os.environ.get("CORTEXLOOP_V4_DATA", Path(__file__).parents[3] / "shared" / "data" / "v4_compact"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the V4 data pack is not here (set CORTEXLOOP_V4_DATA)")
N_IMAGES = 7


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "bank.safetensors"
    cl.ModelBank.from_weights(textbook_neurons()[i] for i in (0, 4, 7)).save(path)
    return path


@pytest.fixture(scope="module")
def bank(models):
    return cl.ModelBank.load(models)


@pytest.fixture(scope="module")
def pixels():
    return procedural_images(N_IMAGES, seed=1)


@pytest.fixture
def folder(tmp_path, pixels):
    path = tmp_path / "pictures"
    path.mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(path / f"image{i + 1:04d}.png")
    return path


def cortexloop(*arguments):
    """Run in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def assert_refused(result, pattern):
    """Exit code 2 and a single line on stderr, nothing on stdout."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert re.search(pattern, err), err


# -------------------------------------------------------------------------------------------------- respond


def read_table(path):
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return archive["images"].tolist(), archive["models"].tolist(), archive["responses"]
    if path.suffix == ".csv":
        lines = [line.split(",") for line in path.read_text().splitlines()]
        return [row[0] for row in lines[1:]], lines[0][1:], np.array([row[1:] for row in lines[1:]]).astype(np.float32)
    table = pytest.importorskip("pyarrow.parquet").read_table(path)
    columns = table.column_names[1:]
    return table.column("image").to_pylist(), columns, np.stack([table.column(c).to_numpy() for c in columns], 1)


@pytest.mark.parametrize("suffix", ["npz", "csv", "parquet"])
def test_respond_writes_what_responses_returns(tmp_path, models, bank, pixels, folder, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / f"out.{suffix}"
    code, printed, err = cortexloop("respond", "--models", models, "--images", folder, "--out", out, "--batch", 3)
    assert code == 0, err
    assert "7 images x 3 models" in printed
    images, names, values = read_table(out)
    assert images == [f"image{i + 1:04d}.png" for i in range(N_IMAGES)]
    assert names == list(bank.names)
    np.testing.assert_array_equal(values, cl.responses(pixels, bank))


@pytest.mark.parametrize("kind", ["zip", "npy", "npz", "NCHW", "recentred"])
def test_respond_reads_every_source(tmp_path, models, bank, pixels, folder, kind):
    options = []
    source = tmp_path / ("images." + (kind if kind in ("zip", "npy", "npz") else "npy"))
    if kind == "zip":
        with zipfile.ZipFile(source, "w") as archive:
            for path in sorted(folder.iterdir(), reverse=True):
                archive.write(path, f"some folder/{path.name}")
    elif kind == "npz":
        np.savez_compressed(source, images=pixels)
    elif kind == "NCHW":
        np.save(source, pixels.transpose(0, 3, 1, 2))
        options = ["--layout", "NCHW"]
    elif kind == "recentred":
        np.save(source, cl.recenter(pixels))
        options = ["--recentred"]
    else:
        np.save(source, pixels)
    out = tmp_path / "out.npz"
    code, _, err = cortexloop("respond", "--models", models, "--images", source, "--out", out, *options)
    assert code == 0, err
    np.testing.assert_array_equal(read_table(out)[2], cl.responses(pixels, bank))


def test_respond_chooses_models_backend_precision_and_threads(tmp_path, models, bank, pixels, folder):
    before = cl.get_num_threads()
    try:
        out = tmp_path / "out.npz"
        code, printed, err = cortexloop(
            "respond", "--models", models, "--images", folder, "--out", out, "--neurons", "dot*,0", "--threads", 1,
            "--backend", "reference", "--precision", "fast", "--json",
        )  # fmt: skip
    finally:
        cl.set_num_threads(before)
    assert code == 0, err
    assert err == ""
    document = json.loads(printed)
    assert (document["backend"], document["threads"], document["precision"]) == ("reference", 1, "fast")
    assert document["images"] == N_IMAGES
    _, names, values = read_table(out)
    assert names == ["dot_small", "edge_0deg"]
    expected = cl.responses(pixels, bank.select(names), precision="fast", backend="reference")
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_respond_resizes_on_request(tmp_path, models, bank):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    out = tmp_path / "out.npz"
    arguments = ("respond", "--models", models, "--images", tmp_path / "a.png", "--out", out)
    assert_refused(cortexloop(*arguments), r"'a\.png': is 60 x 80 pixels .* expected 112 x 112; .*--resize")
    assert cortexloop(*arguments, "--resize")[0] == 0
    resized = np.asarray(picture.resize((112, 112), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(read_table(out)[2], cl.responses(resized[None], bank))


def test_respond_skips_bad_images_on_request_and_lists_them(tmp_path, models, bank, pixels, folder):
    (folder / "image0003.png").write_bytes(b"no picture")
    (folder / "image0005.png").write_bytes((folder / "image0006.png").read_bytes()[:2000])
    out = tmp_path / "out.csv"
    arguments = ("respond", "--models", models, "--images", folder, "--out", out)
    assert_refused(cortexloop(*arguments), r"image 'image0003\.png': is not a picture")
    assert not out.exists()
    code, printed, err = cortexloop(*arguments, "--skip-bad", "--json")
    assert code == 0, err
    assert [s["name"] for s in json.loads(printed)["skipped"]] == ["image0003.png", "image0005.png"]
    images, _, values = read_table(out)
    kept = [0, 1, 3, 5, 6]
    assert images == [f"image{i + 1:04d}.png" for i in kept]
    np.testing.assert_array_equal(values, cl.responses(pixels[kept], bank))
    code, _, err = cortexloop(*arguments, "--skip-bad")
    assert "2 images skipped" in err
    assert "image0005.png" in err


BAD = {
    "missing images": (["--images", "{tmp}/nowhere"], "no such file or folder of images: .*nowhere"),
    "missing models": (["--models", "{tmp}/nowhere.npz"], r"nowhere\.npz"),
    "truncated zip": (["--images", "{tmp}/truncated.zip"], r"truncated\.zip' is no readable zip"),
    "truncated npy": (["--images", "{tmp}/truncated.npy"], r"truncated\.npy' is no readable \.npy"),
    "truncated npz": (["--images", "{tmp}/truncated.npz"], r"truncated\.npz' is no readable \.npz"),
    "truncated models": (["--models", "{tmp}/truncated.safetensors"], r"truncated\.safetensors"),
    "corrupt models": (["--models", "{tmp}/noise.npz"], r"noise\.npz"),
    "wrong shape": (["--images", "{tmp}/flat.npy"], r"should have shape \[N, H, W, 3\], got \[4, 112, 112\]"),
    "channels first": (["--images", "{tmp}/nchw.npy"], 'say that its layout is "NCHW"'),
    "floats": (["--images", "{tmp}/nan.npy"], "should be uint8"),
    "NaN": (["--images", "{tmp}/nan.npy", "--recentred"], "image '1': contains NaN"),
    "unknown layout": (["--layout", "HWC"], 'layout should be "NHWC" or "NCHW", got \'HWC\''),
    "mixed sizes": (["--images", "{tmp}/mixed"], r"'b\.png': is 50 x 60 pixels .* expected 112 x 112"),
    "other input size": (["--images", "{tmp}/small.npy"], "are 64 x 64 pixels .* expected 112 x 112"),
    "empty folder": (["--images", "{tmp}/empty"], "contains no pictures"),
    "unknown neuron": (["--neurons", "nobody"], "'nobody' matches none of the 3 models"),
    "unknown format": (["--out", "{tmp}/out.xlsx"], r"ends in \.npz, \.csv, \.parquet"),
    "missing out folder": (["--out", "{tmp}/nowhere/out.npz"], "nowhere' does not exist"),
    "out is a folder": (["--out", "{tmp}/empty.npz"], "is a folder"),
    "out is the input": (["--images", "{tmp}/good.npy", "--out", "{tmp}/good.npy"], "overwrite its own input"),
    "batch": (["--batch", "0"], "--batch should be at least 1"),
    "threads": (["--threads", "0"], "threads should be at least 1"),
    "backend": (["--backend", "abacus"], "backend should be one of .*'abacus'"),
    "precision": (["--precision", "vague"], "--precision should be exact or fast, got 'vague'"),
    "unknown option": (["--speed", "9"], "No such option: --speed"),
    "no number": (["--batch", "many"], "--batch"),
    "unknown key": (["--images", "{tmp}/good.npz", "--key", "pictures"], "no array 'pictures'; it has images"),
}


@pytest.fixture
def bad_files(tmp_path, models, pixels, folder):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "good.npy", pixels)
    np.savez(tmp_path / "good.npz", images=pixels)
    with zipfile.ZipFile(tmp_path / "good.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    for kind in ("zip", "npy", "npz"):
        data = (tmp_path / f"good.{kind}").read_bytes()
        (tmp_path / f"truncated.{kind}").write_bytes(data[: len(data) * 2 // 3])
    (tmp_path / "truncated.safetensors").write_bytes(models.read_bytes()[:5000])
    (tmp_path / "noise.npz").write_bytes(rng.bytes(5000))
    np.save(tmp_path / "flat.npy", pixels[:4, :, :, 0])
    np.save(tmp_path / "nchw.npy", pixels.transpose(0, 3, 1, 2))
    recentred = cl.recenter(pixels)
    recentred[1, 5, 5] = np.nan
    np.save(tmp_path / "nan.npy", recentred)
    np.save(tmp_path / "small.npy", pixels[:, :64, :64])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.npz").mkdir()
    (tmp_path / "mixed").mkdir()
    Image.fromarray(pixels[0]).save(tmp_path / "mixed" / "a.png")
    Image.fromarray(pixels[0, :50, :60]).save(tmp_path / "mixed" / "b.png")
    return tmp_path


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(bad_files, models, folder, case):
    extra, pattern = BAD[case]
    arguments = {"--models": str(models), "--images": str(folder), "--out": str(bad_files / "out.npz")}
    before = sorted(os.listdir(bad_files)), (bad_files / "good.npy").read_bytes()
    rest = [text.format(tmp=bad_files) for text in extra]
    while rest:
        name = rest.pop(0)
        arguments[name] = rest.pop(0) if rest and not rest[0].startswith("--") else None
    flat = [part for name, value in arguments.items() for part in ((name,) if value is None else (name, value))]
    assert_refused(cortexloop("respond", *flat), pattern)
    assert before == (sorted(os.listdir(bad_files)), (bad_files / "good.npy").read_bytes())


@pytest.mark.parametrize("suffix", ["npz", "csv", "parquet"])
def test_no_space_left_is_one_sentence_and_leaves_nothing(tmp_path, models, folder, suffix, monkeypatch):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    where = tmp_path / "out"
    where.mkdir()
    result = cortexloop("respond", "--models", models, "--images", folder, "--out", where / f"out.{suffix}")
    assert_refused(result, "no space left on the disk")
    assert os.listdir(where) == []


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 64 KiB; only an administrator may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("suffix", ["npz", "csv", "parquet"])
def test_a_disk_that_is_really_full(tmp_path, models, tiny_disk, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    np.save(tmp_path / "images.npy", np.zeros((60, 112, 112, 3), np.uint8))
    (tiny_disk / "filler").write_bytes(bytes(65_536))
    result = cortexloop(
        "respond", "--models", models, "--images", tmp_path / "images.npy", "--out", tiny_disk / f"out.{suffix}"
    )
    assert_refused(result, "no space left on the disk")
    assert os.listdir(tiny_disk) == ["filler"]


def test_a_bug_keeps_its_traceback(tmp_path, models, folder, monkeypatch):
    def broken(*arguments, **options):
        raise ValueError("a bug in the computation")

    monkeypatch.setattr(cl, "stream_responses", broken)
    with pytest.raises(ValueError, match="a bug in the computation"):
        cortexloop("respond", "--models", models, "--images", folder, "--out", tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


def test_respond_memory_does_not_grow_with_the_number_of_images(tmp_path, models):
    """Peak resident memory of a process, with four times as many images: at most a few batches more."""
    code = (
        "import resource, sys; from cortexloop.cli.app import run; assert run(sys.argv[1:]) == 0; "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )

    def peak(n):
        source = tmp_path / f"{n}.npz"
        np.savez_compressed(source, images=np.zeros((n, 112, 112, 3), np.uint8))
        arguments = ["respond", "--models", models, "--images", source, "--out", tmp_path / f"{n}.csv", "--batch", 16]
        arguments += ["--neurons", "dot_small", "--json"]
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
        )
        return int(done.stderr.split()[-1]) * 1024

    few, many = peak(400), peak(1600)
    image_bytes = 112 * 112 * 3
    assert many - few < 0.25 * 1200 * image_bytes


# ----------------------------------------------------------------------------------------------- the others


def test_version_and_help():
    assert cortexloop("--version")[:2] == (0, f"cortexloop {cl.__version__}\n")
    for arguments in ((), ("--help",), ("respond", "--help")):
        code, out, err = cortexloop(*arguments)
        assert code == 0
        assert err == ""
        assert "Usage" in out
    assert_refused(cortexloop("fly"), "No such command 'fly'")


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "cortexloop", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"cortexloop {cl.__version__}\n"
    done = subprocess.run(
        [sys.executable, "-m", "cortexloop", "respond", "--models", "nowhere", "--images", "x", "--out", "y.csv"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")


def test_doctor():
    code, out, _ = cortexloop("doctor", "--json")
    assert code == 0
    document = json.loads(out)
    assert document["threads"] == cl.get_num_threads()
    assert document["packages"]["torch"]
    assert {v["backend"] for v in document["backends"]["bank_forward"]} == {"cpu", "reference"}
    on_a_gpu = document["backends_on_a_gpu"]["bank_forward"]
    assert [v["backend"] for v in on_a_gpu] == ["cuda", "triton", "reference"]
    assert all(v["reason"] for v in on_a_gpu[:2]) or document["gpu"]["devices"]
    assert set(document["variables"]) == {"CORTEXLOOP_ISA", "CORTEXLOOP_NUM_THREADS", "CORTEXLOOP_V4_DATA"}
    code, out, _ = cortexloop("doctor")
    assert code == 0
    for word in ("Versions", "processor", "GPU", "CUDA kernels", "Backends", "Optional packages", "CORTEXLOOP_V4_DATA"):
        assert word in out


def test_doctor_describes_gpus(monkeypatch, fake_cuda):
    properties = SimpleNamespace(name="Imaginary GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    document = json.loads(cortexloop("doctor", "--json")[1])
    assert document["gpu"]["reason"] is None
    assert [d["unsupported"] for d in document["gpu"]["devices"]] == [
        None,
        "there is no GPU number 1, this machine has 1",
    ]
    out = " ".join(cortexloop("doctor")[1].split())
    assert "cuda:0 Imaginary GPU, compute capability 9.0, 80 GiB" in out
    assert "no CUDA kernels: there is no GPU number 1" in out
    assert "CUDA kernels built" in out


def test_bench_times_every_candidate_and_restores_the_threads(models):
    before = cl.get_num_threads()
    code, out, err = cortexloop("bench", "--models", models, "--seconds", "0.1", "--json")
    assert code == 0, err
    assert cl.get_num_threads() == before
    document = json.loads(out)
    assert {(r["op"], r["engine"]) for r in document["rows"]} == {
        (op, engine) for op in ("responses", "input_gradient") for engine in ("cortexloop", "torch modules")
    }
    assert {r["batch"] for r in document["rows"]} == {1, 16}
    assert all(r["ms_per_pair"] > 0 for r in document["rows"])
    assert_refused(cortexloop("bench", "--seconds", "0"), "--seconds should be above 0")


def test_bench_prints_a_table(models):
    code, out, _ = cortexloop("bench", "--models", models, "--seconds", "0.1")
    assert code == 0
    assert "milliseconds per image and model, 3 models" in out


# ----------------------------------------------------------------------------------------------------- demo

QUICK = ("--steps", "3", "--show", "2", "--count", "12")


def assert_self_contained(html):
    """Nothing is loaded: every source is inside the page, and no script, import or address points out of it."""
    assert html.startswith("<!doctype html>")
    assert html.rstrip().endswith("</html>")
    for address in re.findall(r'(?:src|href)="([^"]*)"', html):
        assert address.startswith(("data:image/", "#")), address[:80]
    for forbidden in ("http:", "https:", "<script", "<link", "@import", "url("):
        assert forbidden not in html


def test_demo_of_textbook_neurons(tmp_path):
    code, out, err = cortexloop("demo", "--out", tmp_path / "d", "--neurons", "dot*", *QUICK)
    assert code == 0, err
    assert "dot_small" in out
    assert "report.html" in out
    html = (tmp_path / "d" / "report.html").read_text(encoding="utf-8")
    assert os.listdir(tmp_path / "d") == ["report.html"]
    assert_self_contained(html)
    assert html.count("<article") == 2
    for text in ("dot_small", "dot_large", "a small dot, light or dark", "ms", "gradient ascent"):
        assert text in html


def test_demo_json_and_seed(tmp_path):
    def demo(seed):
        code, out, err = cortexloop("demo", "--out", tmp_path, "--neurons", "0,7", "--seed", seed, "--json", *QUICK)
        assert code == 0
        assert err == ""
        return json.loads(out)["neurons"]

    first, second, other = demo(1), demo(1), demo(2)
    assert first == second
    assert first != other
    assert len(first[0]["preferred_images"]) == 5
    responses = [seen["response"] for seen in first[0]["preferred_images"]]
    assert responses == sorted(responses, reverse=True)


def test_demo_preferred_images_are_the_largest_responses(tmp_path, models, bank, pixels, folder):
    code, out, _ = cortexloop("demo", "--models", models, "--images", folder, "--out", tmp_path / "d", "--json", *QUICK)
    assert code == 0
    document = json.loads(out)
    expected = cl.responses(pixels, bank)
    for n, neuron in enumerate(document["neurons"]):
        best = np.argsort(-expected[:, n])[:5]
        assert [seen["name"] for seen in neuron["preferred_images"]] == [f"image{i + 1:04d}.png" for i in best]
    assert_self_contained((tmp_path / "d" / "report.html").read_text(encoding="utf-8"))


def test_demo_correlates_with_recordings(tmp_path, models, bank, pixels, folder):
    rng = np.random.default_rng(0)
    truth = cl.responses(pixels, bank).T.astype(np.float64)
    raw = truth[..., None] + 0.05 * truth.std() * rng.normal(size=(*truth.shape, 6))
    np.savez(tmp_path / "r.npz", **{"raw/a": raw, "repeat_averaged/b": raw.mean(2)[:, ::-1]})
    arguments = ("demo", "--models", models, "--images", folder, "--responses", tmp_path / "r.npz", *QUICK)
    code, out, err = cortexloop(*arguments, "--recording", "a", "--out", tmp_path / "d", "--json")
    assert code == 0, err
    recording = json.loads(out)["recording"]
    expected = [np.corrcoef(truth[n], raw[n].mean(1))[0, 1] for n in range(3)]
    np.testing.assert_allclose([recording["r"][name] for name in bank.names], expected, atol=1e-5)
    assert recording["median_noise_corrected_r2"] > 0.9
    html = (tmp_path / "d" / "report.html").read_text(encoding="utf-8")
    assert "Prediction and recording" in html
    assert_self_contained(html)
    code, out, err = cortexloop(*arguments, "--recording", "a", "--held-out-from", 3, "--out", tmp_path / "d", "--json")
    assert code == 0, err
    held_out = json.loads(out)["recording"]["r"]
    expected = [np.corrcoef(truth[n, 2:], raw[n, 2:].mean(1))[0, 1] for n in range(3)]
    np.testing.assert_allclose([held_out[name] for name in bank.names], expected, atol=1e-5)


def test_demo_matches_images_by_number(tmp_path, models, bank, pixels, folder):
    """With some images missing the others keep their columns."""
    truth = cl.responses(pixels, bank).T.astype(np.float64)
    np.save(tmp_path / "r.npy", truth)
    for i in (1, 4):
        (folder / f"image{i:04d}.png").unlink()
    code, out, err = cortexloop(
        "demo", "--models", models, "--images", folder, "--responses", tmp_path / "r.npy", "--out", tmp_path / "d",
        "--json", *QUICK,
    )  # fmt: skip
    assert code == 0, err
    np.testing.assert_allclose(list(json.loads(out)["recording"]["r"].values()), 1.0, atol=1e-6)


BAD_DEMO = {
    "responses alone": (["--responses", "{tmp}/r.npz"], "--responses needs the --models and --images"),
    "recording alone": (["--recording", "a"], "need --responses"),
    "steps": (["--steps", "0"], "--steps should be at least 1"),
    "out is a file": (["--out", "{tmp}/file"], "is a file; give a folder"),
    "which recording": (["+", "--responses", "{tmp}/r.npz"], "recordings a, b: choose one with --recording"),
    "wrong neurons": (["+", "--responses", "{tmp}/four.npy"], "the 4 recorded neurons the 3 models"),
    "wrong images": (["+", "--responses", "{tmp}/few.npy"], "which of the 2 recorded responses the 7 images"),
    "nothing held out": (
        ["+", "--responses", "{tmp}/r.npz", "--recording", "a", "--held-out-from", "7"],
        "leaves 1 images to compare",
    ),
    "missing": (["--models", "{tmp}/nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", BAD_DEMO)
def test_demo_bad_input(tmp_path, models, folder, case):
    (tmp_path / "file").write_text("")
    values = np.random.default_rng(0).normal(size=(3, 7))
    np.savez(tmp_path / "r.npz", a=values, b=values)
    np.save(tmp_path / "four.npy", np.random.default_rng(0).normal(size=(4, 7)))
    np.save(tmp_path / "few.npy", values[:, :2])
    extra, pattern = BAD_DEMO[case]
    arguments = [text.format(tmp=tmp_path) for text in extra]
    if arguments[0] == "+":
        arguments = ["--models", models, "--images", folder, *arguments[1:]]
    if "--out" not in arguments:
        arguments += ["--out", tmp_path / "d"]
    assert_refused(cortexloop("demo", "--json", *arguments), pattern)
    assert not (tmp_path / "d").exists()


@needs_data
def test_demo_correlates_published_models_with_their_recording(tmp_path):
    """The published session on the 16 images whose float64 predictions are in the pack."""
    with np.load(DATA / "reference_predictions.npz") as pack:
        rows = np.flatnonzero(pack["image_source"][:, 0] == 190923)
        numbers = pack["image_source"][rows, 1]
        predictions = pack["predictions/190923"][:2, rows]
        images = pack["images_uint8"][rows]
    with np.load(DATA / "responses.npz") as pack:
        recorded = pack["repeat_averaged/190923"][:2, numbers - 1]
    folder = tmp_path / "images_190923"
    folder.mkdir()
    for number, image in zip(numbers, images, strict=True):
        Image.fromarray(image).save(folder / f"image{number:04d}.png")
    code, out, err = cortexloop(
        "demo", "--models", DATA / "compact_models.npz", "--images", folder, "--responses", DATA / "responses.npz",
        "--neurons", "*/neuron0,*/neuron1", "--steps", 2, "--show", 1, "--out", tmp_path / "d", "--json",
    )  # fmt: skip
    assert code == 0, err
    document = json.loads(out)
    assert document["models"] == 2  # those of the other session are left out
    assert document["recording"]["name"] == "190923"
    expected = [np.corrcoef(predictions[n], recorded[n])[0, 1] for n in range(2)]
    found = [document["recording"]["r"][f"190923/neuron{n}"] for n in range(2)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_demo_of_the_reference_backend_does_less(tmp_path):
    code, out, err = cortexloop(
        "demo", "--out", tmp_path, "--neurons", "dot_small", "--backend", "reference", "--count", "8", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["machine"]["backend"] == "reference"
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "40 steps of gradient ascent" in html
    assert "40 steps of gradient ascent instead of 100, dots 16 pixels apart instead of 4." in html
    assert "images instead of" not in html  # as many as were asked for


def test_demo_of_the_kernels_is_not_called_reduced(tmp_path):
    if cl.explain("bank_forward").chosen != "cpu":
        pytest.skip("the C++ kernels are not here")
    code, _, err = cortexloop("demo", "--out", tmp_path, "--neurons", "dot_small", *QUICK)
    assert code == 0, err
    assert "instead of" not in (tmp_path / "report.html").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("command", ["demo", "respond"])
def test_an_interruption_is_told(tmp_path, monkeypatch, models, folder, command):
    """Whatever the version of typer does with a KeyboardInterrupt."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"cortexloop.cli.{command}.settle_backend", interrupted)
    out = tmp_path / ("out" if command == "demo" else "out.csv")
    code, printed, err = cortexloop(command, "--models", models, "--images", folder, "--out", out)
    assert (code, printed) == (130, "")
    assert err == "error: interrupted; nothing was written\n"
    assert not out.exists()

from __future__ import annotations

import csv
import errno
import os
import sys
import tracemalloc

import numpy as np
import pytest

from cortexloop.io import open_table

SUFFIXES = ("npz", "csv", "parquet")


def read(path):
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return archive["images"].tolist(), archive["models"].tolist(), archive["responses"]
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        values = np.array([[float(cell) for cell in row[1:]] for row in rows], np.float32)
        return [row[0] for row in rows], header[1:], values.reshape(len(rows), len(header) - 1)
    pq = pytest.importorskip("pyarrow.parquet")
    table = pq.read_table(path)
    names = table.column("image").to_pylist()
    values = np.stack([table.column(c).to_numpy() for c in table.column_names[1:]], 1).astype(np.float32)
    return names, table.column_names[1:], values


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_come_back_bit_for_bit(tmp_path, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    values = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    names = ["a", 'quoted ", comma', "line\nbreak", "ü", "e", "f", "0"]
    models = ["s/neuron0", "s/neuron1", "with, comma"]
    path = tmp_path / f"out.{suffix}"
    with open_table(path, models) as table:
        table.append(names[:4], values[:4])
        table.append(names[4:], values[4:].astype(np.float64))
        assert table.rows == 7
        assert not path.exists()
    got_names, got_models, got = read(path)
    assert got_names == names
    assert got_models == models
    np.testing.assert_array_equal(got, values)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failure_leaves_nothing(tmp_path, suffix):
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=r"shape \[2, 3\], got \[2, 2\]"):
        fill(tmp_path / f"out.{suffix}", 1, columns=2, declared=3)
    assert os.listdir(tmp_path) == []


def fill(path, batches, columns=50, declared=None, rows=500):
    block = np.full((rows if declared is None else 2, columns), 0.1, np.float32)
    with open_table(path, [f"m{j}" for j in range(declared or columns)]) as table:
        for i in range(batches):
            table.append([f"image{i}-{j}" for j in range(len(block))], block)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_no_space_left(tmp_path, suffix, monkeypatch):
    """The last flush fails as on a full disk; for real small disks see the command line tests."""
    if suffix == "parquet":
        pytest.importorskip("pyarrow")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left on the disk"):
        fill(tmp_path / f"out.{suffix}", 1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", ["npz", "csv"])
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("cortexloop.io.tables._CHUNK_BYTES", 1 << 17)

    def peak(batches):
        tracemalloc.start()
        try:
            fill(tmp_path / f"out.{suffix}", batches)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)
    few, many = peak(2), peak(40)
    assert many < 1.5 * few


def test_parquet_holds_one_row_group_at_most(tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("cortexloop.io.tables._CHUNK_BYTES", 50 * 4 * 1000)
    fill(tmp_path / "out.parquet", 7)
    groups = pq.ParquetFile(tmp_path / "out.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [1000, 1000, 1000, 500]


def test_unsuitable_names(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.npz, \.csv, \.parquet"):
        fill(tmp_path / "out.xlsx", 1)
    with pytest.raises(ValueError, match="got 'a' twice"), open_table(tmp_path / "out.csv", ["a", "b", "a"]):
        pass
    assert os.listdir(tmp_path) == []


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"cortexloop\[parquet\]"):
        fill(tmp_path / "out.parquet", 1)
    assert os.listdir(tmp_path) == []

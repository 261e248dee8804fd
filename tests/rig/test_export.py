"""Tables and files of a session against its records, and against how others read them."""

from __future__ import annotations

import csv
import json
import math
import sys

import h5py
import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cortexloop.realtime.pixels import PIXELS
from cortexloop.realtime.records import BatchMade, Told
from cortexloop.rig import export as exporting
from cortexloop.rig.export import CsvTables, export, exporters, register
from cortexloop.rig.history import History, Recording
from cortexloop.rig.session_tables import tables
from cortexloop.rig.timeline import summaries, timeline
from cortexloop.rig.xdream import image_name
from session_files import IMAGES, REFERENCES, SHAPE, UNITS, response, write_session

GENERATIONS = 3


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """(folder, records)"""
    folder = tmp_path_factory.mktemp("sessions") / "session"
    return folder, write_session(folder, GENERATIONS)


@pytest.fixture
def recording(session):
    with Recording.open(session[0]) as recording:
        yield recording


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_response_is_there_once_and_exactly(recording, session, tmp_path):
    export(recording, "csv", tmp_path)
    found = rows(tmp_path / "responses.csv")
    told = [r for r in session[1] if isinstance(r, Told)]
    assert len(found) == len(told) * len(UNITS)
    for row in found:
        number = int(row["pres_id"].rpartition(".")[2])
        assert float(row["response"]) == response(int(row["generation"]), number, UNITS.index(row["unit"]))
        assert (row["status"], row["window_from_ms"], row["window_to_ms"]) == ("ok", "50.0", "200.0")
        assert (row["baseline_from_ms"], row["told_by"], row["response_kind"]) == ("", "oe", "rate")
        assert row["counts"] == "1"


def test_presentations_keep_raw_times_and_name_the_image(recording, session, tmp_path):
    export(recording, "csv", tmp_path)
    found = {row["pres_id"]: row for row in rows(tmp_path / "presentations.csv")}
    made = {r.batch_id: r for r in session[1] if isinstance(r, BatchMade)}
    assert len(found) == sum(len(r.order) for r in made.values())
    reports = [r for r in session[1] if type(r).__name__ == "ShownEvents"]
    for report in reports:
        for event, onset in zip(report.events, report.onsets, strict=True):
            row = found[event.pres_id]
            assert (float(row["t_on"]), int(row["diode"])) == (event.t_on, event.diode)
            assert (row["clock"], row["acquisition"], row["outcome"]) == ("ptb", "oe", event.outcome)
            assert (int(row["onset_ns"]), row["onset_by"]) == (onset.t_ns, "photodiode")
            batch = made[row["batch_id"]]
            index = batch.order[int(row["position"])]
            assert (row["item_id"], row["sha"]) == (batch.items[index].item_id, batch.shas[index])
            assert row["label"] == (batch.items[index].label or "")
    assert found["evo-0001.0003"]["counts"] == "0"
    assert found["evo-0001.0003"]["outcome"] == "no_fix"
    assert found["evo-0000.0003"]["counts"] == "1"


def test_batches_say_what_was_learned(recording, tmp_path):
    export(recording, "csv", tmp_path)
    found = {row["batch_id"]: row for row in rows(tmp_path / "batches.csv")}
    assert list(found) == ["evo-0000", "evo-0001", "filler-0000", "evo-0001-r1", "evo-0002"]
    first, second = found["evo-0000"], found["evo-0001"]
    scores = [np.mean([response(0, k, unit) for unit in (0, 1)]) for k in range(2, 6)]
    assert float(first["score_mean"]) == np.mean(scores)
    assert float(first["score_best"]) == max(scores)
    assert float(first["reference_mean"]) == np.mean([response(0, k, unit) for k in (0, 1) for unit in (0, 1)])
    assert (first["responded"], first["in_vain"], first["learned"]) == ("6", "0", "1")
    assert (second["responded"], second["in_vain"], second["scores_missing"]) == ("5", "1", "1")
    assert (second["late_ms"], second["served_to"]) == ("1.5", "ml")
    assert (found["evo-0001-r1"]["repairs"], found["evo-0001-r1"]["in_vain"]) == ("evo-0001", "1")
    assert (found["filler-0000"]["stream"], found["filler-0000"]["learned"]) == ("", "0")
    items = rows(tmp_path / "items.csv")
    missing = next(row for row in items if row["item_id"] == "evo-0001-000" and row["batch_id"] == "evo-0001")
    assert (missing["score"], missing["responded"]) == ("", "0")


def test_notes_clocks_settings_and_codes(recording, session, tmp_path):
    files = export(recording, "csv", tmp_path)
    assert sorted(path.name for path in files) == sorted(path.name for path in tmp_path.iterdir())
    notes = rows(tmp_path / "notes.csv")
    assert [row["what"] for row in notes] == ["opened", "deadline_miss", "note", "closed"]
    assert notes[2]["text"] == "water, 20 ml"
    assert [row["shortest_ns"] for row in rows(tmp_path / "clocks.csv")] == ["1"] * GENERATIONS
    assert len(rows(tmp_path / "exchanges.csv")) == 2 * GENERATIONS
    assert json.loads((tmp_path / "session.json").read_text())["session"] == "monkey-1"
    with np.load(tmp_path / "codes.npz") as codes:
        made = [r for r in session[1] if isinstance(r, BatchMade) and r.codes is not None]
        assert np.array_equal(codes["evo"], np.concatenate([r.codes.numpy() for r in made]))
        assert codes["evo"].dtype == np.float32
        assert codes["evo.items"].tolist() == [i.item_id for r in made for i in r.items if i.kind == "gen"]


def test_parquet_has_the_same_tables_with_types(recording, tmp_path):
    export(recording, "parquet", tmp_path)
    for table in tables(recording.history):
        names = [name for name, _ in table.columns]
        found = pq.read_table(tmp_path / f"{table.name}.parquet").to_pylist()
        assert found == [dict(zip(names, row, strict=True)) for row in table.rows()]
    schema = pq.read_schema(tmp_path / "presentations.parquet")
    assert str(schema.field("diode").type) == "int64"
    assert str(schema.field("t_on").type) == "double"
    assert str(schema.field("counts").type) == "bool"


def test_a_clock_of_large_integers_keeps_every_digit(session, tmp_path):
    """Nanoseconds since 1970 have more digits than a double."""
    records = [r for r in session[1] if type(r).__name__ in ("Start", "BatchMade", "ShownEvents")][:3]
    event = msgspec.structs.replace(records[2].events[0], t_on=1_700_000_000_123_456_789)
    history = History.of([records[0], records[1], msgspec.structs.replace(records[2], events=[event])])
    table = next(t for t in tables(history) if t.name == "presentations")
    column = [name for name, _ in table.columns].index("t_on")
    assert table.kinds()[column] == "integer"
    assert next(row[column] for row in table.rows() if row[column]) == 1_700_000_000_123_456_789


def test_every_image_once(recording, tmp_path):
    files = export(recording, "images", tmp_path)
    assert sorted(path.name for path in files) == sorted(f"{sha[:16]}.png" for sha in recording.pixels.shas())
    assert len(files) == REFERENCES + GENERATIONS * IMAGES
    for sha in recording.pixels.shas():
        with Image.open(tmp_path / "images" / f"{sha[:16]}.png") as image:
            assert np.array_equal(np.asarray(image), recording.pixels.get(sha))


def read_as_xdream(path):
    """Names and responses, by the rules that XDREAM's readers follow."""
    with h5py.File(path, "r") as file:
        names = ["".join(map(chr, np.array(file[ref]).flatten())) for ref in np.array(file["stimulusID"])[0]]
        return [name.split("\\")[-1] for name in names], np.array(file["tEvokedResp"])


def test_xdream_files(recording, tmp_path):
    export(recording, "xdream", tmp_path)
    names, responses = read_as_xdream(tmp_path / "block000.mat")
    assert responses.shape == (6, len(UNITS))
    order = [1, 0, 3, 2, 5, 4]
    items = [item.item_id for item in recording.history.batches["evo-0000"].made.items]
    assert names == [f"block000_{index:03d}_{items[index]}.png" for index in order]
    assert responses.tolist() == [[response(0, k, unit) for unit in (0, 1)] for k in range(6)]
    assert all((tmp_path / name).is_file() for name in names)
    with h5py.File(tmp_path / "block000.h5") as file:
        in_order = sorted(path.name for path in tmp_path.glob("block000_*.png"))
        assert [in_order[i] for i in file["indices"][()]] == names
        assert np.array_equal(file["scores"][()], responses)
        assert file["units"][()].tolist() == [unit.encode() for unit in UNITS]
    batch = recording.history.batches["evo-0001"]
    for position, (item, sha) in enumerate(zip(batch.made.items, batch.made.shas, strict=True)):
        with Image.open(tmp_path / f"block001_{position:03d}_{item.item_id}.png") as image:
            assert np.array_equal(np.asarray(image), recording.pixels.get(sha))
            assert image.size == (SHAPE[1], SHAPE[0])
    assert len(read_as_xdream(tmp_path / "block001.mat")[0]) == 5
    assert not (tmp_path / "block003.mat").exists(), "a batch without a response that counts has no scores"
    assert len(list(tmp_path.glob("*.png"))) == GENERATIONS * (REFERENCES + IMAGES) + REFERENCES + 1


def test_no_name_leads_out_of_the_folder():
    assert image_name(3, 1, "../a/b\\c d") == "block003_001_.._a_b_c_d.png"


def test_the_mat_file_begins_as_matlab_expects(recording, tmp_path):
    export(recording, "xdream", tmp_path)
    head = (tmp_path / "block000.mat").read_bytes()[:520]
    assert head.startswith(b"MATLAB 7.3 MAT-file")
    assert head[124:128] == b"\x00\x02IM"
    assert head[512:516] == b"\x89HDF"
    with h5py.File(tmp_path / "block000.mat") as file:
        assert file.userblock_size == 512
        assert file["stimulusID"].attrs["MATLAB_class"] == b"cell"
        assert file["tEvokedResp"].attrs["MATLAB_class"] == b"double"


def test_units_that_were_not_always_told(session, tmp_path):
    """A unit that comes later is NaN before."""
    records, late = [], False
    for record in session[1]:
        late = late or (isinstance(record, BatchMade) and record.batch_id == "evo-0002")
        if late and isinstance(record, Told):
            record = msgspec.structs.replace(record, header=msgspec.structs.replace(record.header, units=["b", "c"]))
        records.append(record)
    with Recording.open(session[0]) as recording:
        changed = Recording(recording.scan, History.of(records), recording.pixels)
        export(changed, "xdream", tmp_path)
    assert np.isnan(read_as_xdream(tmp_path / "block000.mat")[1][:, 2]).all()
    last = read_as_xdream(tmp_path / "block004.mat")[1]
    assert np.isnan(last[:, 0]).all()
    assert last[:, 1].tolist() == [response(2, k, 0) for k in range(6)]


def test_a_session_without_its_images(session, tmp_path):
    """Responses are written all the same."""
    with Recording.open(session[0]) as recording:
        export(Recording(recording.scan, recording.history, None), "xdream", tmp_path)
    assert not list(tmp_path.glob("*.png"))
    assert len(list(tmp_path.glob("*.mat"))) == 4


def test_reading_changes_nothing(session, tmp_path):
    """Also not a torn end, which belongs to whoever writes."""
    folder = session[0]
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("session.rigj", PIXELS):
        (copy / name).write_bytes((folder / name).read_bytes() + b"\1\2\3")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    with Recording.open(copy) as recording:
        export(recording, "csv", tmp_path / "out")
        list(timeline(recording))
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_formats_of_ones_own(recording, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "_EXPORTERS", dict(exporters()))

    class Count:
        name, about = "count", "how many tells there are"

        def write(self, recording, out):
            (out / "count.txt").write_text(str(len(recording.history.tells)))
            return [out / "count.txt"]

    register(Count())
    assert export(recording, "count", tmp_path) == [tmp_path / "count.txt"]
    assert (tmp_path / "count.txt").read_text() == "19"
    with pytest.raises(ValueError, match="already"):
        register(CsvTables())
    with pytest.raises(ValueError, match="should be one of count, csv, images, parquet, xdream, got 'nwb'"):
        export(recording, "nwb", tmp_path)


@pytest.mark.parametrize(("to", "package"), [("parquet", "pyarrow"), ("xdream", "h5py")])
def test_a_missing_package_is_named_with_its_extra(recording, tmp_path, monkeypatch, to, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{package}.*cortexloop\[rig\]"):
        export(recording, to, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_timeline(recording, session):
    lines = list(timeline(recording))
    assert [line.seconds for line in lines] == sorted(line.seconds for line in lines)
    whats = [line.what for line in lines]
    assert whats.count("learned") == GENERATIONS
    assert whats.count("told") == sum(isinstance(r, Told) for r in session[1])
    assert [whats[0], whats[1], whats[-1]] == ["start", "opened", "closed"]
    text = "\n".join(f"{line.what} {line.text}" for line in lines)
    assert "4 images and 2 references, 6 presentations" in text
    assert "1.5 ms late" in text
    assert "1 of 4 missing" in text
    assert "deadline_miss no batch was ready" in text
    assert "repair evo-0001-r1: 1 presentations, what 'evo-0001' missed" in text


def test_summaries(recording):
    (stream,) = summaries(recording.history)
    assert stream.name == "evo"
    assert len(stream.means) == len(stream.bests) == len(stream.references) == GENERATIONS
    assert stream.bests[0] == np.mean([response(0, 5, unit) for unit in (0, 1)])
    assert not math.isnan(sum(stream.references))

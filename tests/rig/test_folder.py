"""A rig that exchanges files: what it sees, what it may write, and what is never touched."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image
from rig_parts import make_session, neurons, serving

from cortexloop.io.score_files import ScoreReader, Scores, read_scores
from cortexloop.realtime import messages as m
from cortexloop.rig.folder import FolderRig


class Direct:
    """A link straight into a session."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.sent: list[m.Request] = []
        self.data: Any = None

    def request(self, request: m.Request, buffer: Any = None) -> Any:
        self.sent.append(request)
        self.data = buffer if isinstance(request, m.Tell) else self.data
        answer = self.session.handle("folder", request, buffer)
        until = time.monotonic() + 10
        while answer is None:
            assert time.monotonic() < until
            time.sleep(0.001)
            answer = next((out for _, out in self.session.poll()), None)
        return answer


class InProcess:
    """Reads without another process."""

    def read(self, path: Any) -> Scores:
        return read_scores(path)

    def close(self) -> None:
        pass


def folder_rig(session: Any, where: Path, **options: Any) -> FolderRig:
    return FolderRig(Direct(session), where / "images", where / "scores", **{"reader": InProcess(), **options})


def settled(rig: FolderRig, path: Path) -> None:
    """Look until a file is taken or put aside."""
    until = time.monotonic() + 10
    while path.exists() and rig._block is not None:
        rig.step()
        assert time.monotonic() < until, "the file is not taken"
        time.sleep(0.005)


def pictures_of(where: Path, suffix: str = "png") -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p)) for p in sorted((where / "images").glob(f"*.{suffix}"))}


def write_mat(path: Path, names: list[str], responses: np.ndarray) -> None:
    """As MATLAB's save(..., '-v7.3') does: 512 bytes before, texts as references to 16-bit numbers, axes reversed."""
    with h5py.File(path, "w", userblock_size=512) as file:
        texts = file.create_group("#refs#")
        cell = file.create_dataset("stimulusID", (1, len(names)), h5py.ref_dtype)
        for i, name in enumerate(names):
            text = texts.create_dataset(f"r{i}", data=np.frombuffer(name.encode("utf-16-le"), "<u2")[:, None])
            cell[0, i] = text.ref
        file.create_dataset("tEvokedResp", data=responses, compression="gzip")


def write_json(path: Path, ids: list[str], scores: Any, **more: Any) -> None:
    path.write_text(json.dumps({"ids": ids, "scores": scores, **more}))


def test_a_session_over_files(tmp_path: Path):
    with make_session(tmp_path / "session", rounds=2, repeats=2) as session:
        rig = folder_rig(session, tmp_path, settle_s=0.02)
        (tmp_path / "images" / "keep.png").write_bytes(b"not ours")
        (tmp_path / "scores" / "block004.mat").write_bytes(b"yesterday's")
        rig.step()
        block = 5
        for _ in range(6):
            shown = pictures_of_block(tmp_path, block)
            assert len(shown) == 2 + 2 * 4
            manifest = json.loads((tmp_path / "images" / f"block{block:03d}_manifest.json").read_text())
            assert [x["file"] for x in manifest["files"]] == sorted(shown)
            assert [x["kind"] for x in manifest["files"]][:3] == ["ref", "ref", "gen"]
            order = list(shown)[::-1]  # the rig's order is its own affair
            responses = np.array([neurons(np.ascontiguousarray(shown[name])) for name in order])
            path = tmp_path / "scores" / f"block{block:03d}.mat"
            write_mat(path, [f"C:\\stimuli\\{name}" for name in order], responses)
            until = time.monotonic() + 10
            while pictures_of_block(tmp_path, block):
                rig.step()
                assert time.monotonic() < until
            rig.step()
            block += 1
        assert rig.finished
        assert session.state == "finished"
        assert session.status().told == 6 * 10
        assert (tmp_path / "images" / "keep.png").read_bytes() == b"not ours"
        assert (tmp_path / "scores" / "block004.mat").read_bytes() == b"yesterday's"
        assert not (tmp_path / "scores" / "rejected").exists()
        assert not list((tmp_path / "images" / ".partial").iterdir())


def pictures_of_block(where: Path, block: int) -> dict[str, np.ndarray]:
    found = sorted((where / "images").glob(f"block{block:03d}_*.png"))
    return {path.name: np.asarray(Image.open(path)) for path in found}


@pytest.mark.parametrize("by", ["file", "stem", "pres", "item", "indices"])
def test_rows_are_matched_by_what_they_say(tmp_path: Path, by: str):
    with make_session(tmp_path / "session") as session:
        rig = folder_rig(session, tmp_path)
        rig.step()
        files = rig._block.files
        order = [3, 1, 0, 5, 2]  # one is missing
        names = {"file": "file", "stem": "file", "pres": "pres_id", "item": "item_id", "indices": "file"}[by]
        ids = [getattr(files[i], names) for i in order]
        ids = [name.rpartition(".")[0] for name in ids] if by == "stem" else ids
        values = np.arange(5.0)[:, None] * [1, 10]
        path = tmp_path / "scores" / "block000.h5"
        with h5py.File(path, "w") as file:
            file["scores"] = values
            if by == "indices":
                file["indices"] = order
            else:
                file["ids"] = ids
        settled(rig, path)
        (tell,) = (x for x in rig._link.sent if isinstance(x, m.Tell))
        assert tell.item_ids == [files[i].item_id for i in order]
        assert tell.pres_ids == (None if by == "item" else [files[i].pres_id for i in order])
        assert tell.units == ["ch0", "ch1"]
        assert tell.final
        assert session.status().told == 5


def test_scores_in_json_are_taken_at_once_and_repetitions_averaged(tmp_path: Path):
    with make_session(tmp_path / "session") as session:
        rig = folder_rig(session, tmp_path, settle_s=1e9)
        rig.step()
        names = [x.file for x in rig._block.files]
        path = tmp_path / "scores" / "block000.json"
        scores = [[1.0, 2.0]] * 5 + [[None, 2.0]]
        write_json(
            path,
            [*names, names[0], names[1], "extra.png"],
            [*scores, [3.0, 6.0], [None, 1.0], [9, 9]],
            units=["a", "b"],
        )
        assert rig.step()
        (tell,) = (x for x in rig._link.sent if isinstance(x, m.Tell))
        assert tell.status == ["ok"] * 5 + ["missing"]
        assert tell.units == ["a", "b"]
        sent = np.frombuffer(rig._link.data, np.float64).reshape(6, 2)
        np.testing.assert_array_equal(sent[:5], [[2, 4], [1, 2], [1, 2], [1, 2], [1, 2]])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("block000.json", {"scores": [1.0]}, "should look like"),
        ("block000.json", {"ids": ["x.png"], "scores": [1.0]}, "none of its rows belongs to block 000: 'x.png'"),
        ("block000.json", {"ids": ["../../x", "y"], "scores": [1.0]}, "1 rows, ids 2 entries"),
        ("block000.json", {"ids": ["a", "b"], "scores": [[1.0], [1.0, 2.0]]}, "as many numbers"),
        ("block000.json", {"indices": [99], "scores": [1.0]}, "indices should be 0 to 5"),
        ("block000.json", {"indices": [0.5], "scores": [1.0]}, "whole numbers"),
        ("block000.json", {"indices": [0], "scores": [1.0], "units": ["a", "b"]}, "2 entries"),
        ("block000.json", "[" * 9999, "not complete"),
        ("block000.mat", "MATLAB 5.0 MAT-file", "-v7.3"),
        ("block000.h5", {"scores": np.zeros(6)}, "never guessed from the order"),
        ("block000.h5", {"responses": np.zeros(6)}, "it has responses"),
        ("block000.h5", {"scores": np.zeros((2, 6)), "indices": np.arange(6)}, "transposed"),
        ("block000.mat", {"stimulusID": np.zeros(6), "tEvokedResp": np.zeros((6, 1))}, "cell array"),
        ("block000.mat", {"stimulusID": np.zeros(6)}, "it has stimulusID"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_put_aside(tmp_path: Path, name: str, content: Any, says: str):
    with make_session(tmp_path / "session") as session:
        rig = folder_rig(session, tmp_path, settle_s=0.01, reject_s=0.05)
        rig.step()
        path = tmp_path / "scores" / name
        if isinstance(content, str):
            path.write_text(content)
        elif path.suffix == ".json":
            path.write_text(json.dumps(content))
        else:
            with h5py.File(path, "w") as file:
                for key, value in content.items():
                    file[key] = value
        settled(rig, path)
        stem, suffix = path.stem, path.suffix
        assert says in (tmp_path / "scores" / "rejected" / f"{stem}-0.txt").read_text()
        assert (tmp_path / "scores" / "rejected" / f"{stem}-0{suffix}").exists()
        assert session.status().told == 0
        # A better one is still welcome.
        write_json(tmp_path / "scores" / "block000.json", [x.file for x in rig._block.files], [1.0] * 6)
        assert rig.step()
        assert session.status().told == 6


def test_a_file_in_the_making_is_left_alone(tmp_path: Path):
    with make_session(tmp_path / "session") as session:
        rig = folder_rig(session, tmp_path, settle_s=0.1, reject_s=0.5)
        rig.step()
        path, whole = tmp_path / "scores" / "block000.json", tmp_path / "whole"
        write_json(whole, [x.file for x in rig._block.files], [1.0] * 6)
        data = whole.read_bytes()
        for end in range(1, len(data), len(data) // 7):
            path.write_bytes(data[:end])
            assert not rig.step()
        path.write_bytes(data)
        assert rig.step()
        rig.step()
        growing = tmp_path / "scores" / "block001.mat"
        write_mat(growing, [x.file for x in rig._block.files], np.ones((6, 1)))
        for size in range(3):
            os.utime(growing, (size, size))  # someone is still writing
            assert not rig.step()
            time.sleep(0.02)
        time.sleep(0.1)
        assert rig.step()
        assert not (tmp_path / "scores" / "rejected").exists()


def test_a_restart_goes_on_with_the_block_that_is_out(tmp_path: Path):
    with make_session(tmp_path / "session") as session:
        rig = folder_rig(session, tmp_path)
        rig.step()
        before = pictures_of(tmp_path)
        again = folder_rig(session, tmp_path)
        again.step()
        assert again._block.number == 0
        assert pictures_of(tmp_path).keys() == before.keys()
        # A file is lost: the block is written anew under the next number, and nothing of the old one is left.
        (tmp_path / "images" / list(before)[2]).unlink()
        third = folder_rig(session, tmp_path)
        third.step()
        assert third._block.number == 1
        assert all(name.startswith("block001") for name in pictures_of(tmp_path))


def test_what_a_crash_left_half_published_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with make_session(tmp_path / "session") as session:
        rig = folder_rig(session, tmp_path)
        replaced = []

        def failing(source: Any, target: Any) -> None:
            if len(replaced) == 3:
                raise OSError("crash")
            replaced.append(target)
            os.rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr("cortexloop.rig.folder.os.replace", failing)
            with pytest.raises(OSError, match="crash"):
                rig.step()
        assert len(pictures_of(tmp_path)) == 3
        again = folder_rig(session, tmp_path)
        again.step()
        names = list(pictures_of(tmp_path))
        assert len(names) == 6
        assert names == [x.file for x in again._block.files]
        assert not list((tmp_path / "images" / ".partial").iterdir())


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path):
    with make_session(tmp_path / "session") as session:
        (tmp_path / "images").mkdir()
        precious = tmp_path / "precious.png"
        precious.write_bytes(b"x")
        files = [{"file": "../precious.png", "pres_id": "p", "item_id": "i"}]
        manifest = {"session": "test", "block": 0, "batch_id": "old", "files": files}
        (tmp_path / "images" / "block000_manifest.json").write_text(json.dumps(manifest))
        folder_rig(session, tmp_path).step()
        assert precious.exists()


def test_scores_wait_for_a_session_that_cannot_take_them(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A full disk, for example: the file stays where it is, and one line says why."""
    with make_session(tmp_path / "session") as session:
        rig = folder_rig(session, tmp_path)
        rig.step()
        request, asked = rig._link.request, []

        def faulty(message: m.Request, buffer: Any = None) -> Any:
            if not isinstance(message, m.Tell):
                return request(message, buffer)
            asked.append(message.id)
            return m.Error(id=message.id, code="FAULT", text="no space left"), None

        rig._link.request = faulty
        path = tmp_path / "scores" / "block000.json"
        write_json(path, [x.file for x in rig._block.files], [1.0] * 6)
        for _ in range(30):
            assert not rig.step()
            time.sleep(0.01)
        assert path.exists()
        assert 1 <= len(asked) <= 3
        assert len(set(asked)) == 1
        assert [record.message for record in caplog.records] == [
            "the scores block000.json are not taken yet: no space left"
        ]
        rig._link.request = request
        time.sleep(0.25)
        assert rig.step()
        assert session.status().told == 6


def test_bitmaps_and_names_that_no_file_may_have(tmp_path: Path):
    items = [m.Item(item_id="a/../b:c", kind="gen", sha="0" * 16)]
    batch = m.Batch(
        id="1", batch_id="b", stream="s", generation=0, kind="gen", items=items, order=[0], pres_ids=["p"],
        shape=(1, 4, 5, 3),
    )  # fmt: skip

    class Link:
        def request(self, request: m.Request, buffer: Any = None) -> Any:
            if isinstance(request, m.Hello):
                point = m.ResumePoint()
                return (
                    m.Welcome(id="h", session="s", version=1, server_clock_ns=0, resume=point, config=""),
                    None,
                )
            return batch, bytes(range(60))

    rig = FolderRig(Link(), tmp_path / "images", image_format="bmp", reader=InProcess())
    rig.step()
    (path,) = (tmp_path / "images").glob("*.bmp")
    assert path.name == "block000_000_a_.._b_c.bmp"
    assert np.asarray(Image.open(path)).tobytes() == bytes(range(60))


def test_a_thread_serves_folders_beside_the_network(tmp_path: Path):
    with make_session(tmp_path / "session") as session:
        stop = threading.Event()
        with serving(session) as server:
            rig = FolderRig(server.local("folder"), tmp_path / "images", reader=InProcess())
            thread = threading.Thread(target=rig.run, args=(stop, 0.005))
            thread.start()
            for block in range(3):
                manifest = tmp_path / "images" / f"block{block:03d}_manifest.json"
                until = time.monotonic() + 10
                while not manifest.exists():
                    assert time.monotonic() < until
                    time.sleep(0.005)
                names = [x["file"] for x in json.loads(manifest.read_text())["files"]]
                partial = tmp_path / "unfinished"
                write_json(partial, names, [1.0] * len(names))
                os.replace(partial, tmp_path / "images" / f"block{block:03d}.json")
            thread.join(10)
            stop.set()
            assert not thread.is_alive()
            assert rig.finished
            assert session.status().told == 18


def test_a_server_that_stops_lets_the_folder_go(tmp_path: Path):
    with make_session(tmp_path / "session", n=4) as session:
        stop = threading.Event()
        with serving(session) as server:
            rig = FolderRig(server.local("folder"), tmp_path / "images", reader=InProcess())
            rig.step()
            rig._after, rig._block = rig._block.batch_id, None  # nothing comes after it until it is told
            thread = threading.Thread(target=rig.run, args=(stop,))
            thread.start()
            time.sleep(0.1)
            stop.set()
        thread.join(5)
        assert not thread.is_alive()


# ---------------------------------------------------------------------------------------------- the reader's process


def test_files_are_read_in_another_process(tmp_path: Path):
    reader = ScoreReader(timeout_s=20)
    write_mat(tmp_path / "a.mat", ["x.png", "ÿ.png"], np.array([[1.0, np.nan], [3.0, 4.0]]))
    write_json(tmp_path / "a.json", ["x"], [[1.5, 2.5]], units=["u", "v"])
    try:
        for path in (tmp_path / "a.mat", tmp_path / "a.json"):
            here, there = read_scores(path), reader.read(path)
            np.testing.assert_array_equal(here.values, there.values)
            assert (here.ids, here.indices, here.units) == (there.ids, there.indices, there.units)
        with pytest.raises(OSError, match="No such file"):
            reader.read(tmp_path / "b.mat")
        (tmp_path / "c.h5").write_bytes(b"x" * 3000)
        with pytest.raises(ValueError, match=r"-v7\.3"):
            reader.read(tmp_path / "c.h5")
        process = reader._process
        process.kill()
        process.wait()
        with pytest.raises(ValueError, match="crashed at it"):
            reader.read(tmp_path / "a.mat")
        assert reader.read(tmp_path / "a.mat").ids == ["x.png", "ÿ.png"]
    finally:
        reader.close()


def test_damaged_files_are_errors_of_the_file(tmp_path: Path, rng: np.random.Generator):
    """Bytes changed and cut off at random; the process may end at one, the caller not."""
    whole = tmp_path / "whole.mat"
    write_mat(whole, ["x.png", "y.png"], np.ones((2, 3)))
    data, reader = whole.read_bytes(), ScoreReader(timeout_s=5)
    try:
        for number in range(18):
            broken = bytearray(data[: int(rng.integers(1, len(data)))] if number % 3 == 0 else data)
            for at in rng.integers(0, len(broken), 8):
                broken[at] = rng.integers(256)
            path = tmp_path / f"{number}.mat"
            path.write_bytes(broken)
            try:
                found = reader.read(path)
            except (ValueError, OSError):
                continue
            assert len(found.values) == len(found.ids or [])
    finally:
        reader.close()

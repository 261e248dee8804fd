"""Configurations: every mistake is named by its field, every example can be made."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cortexloop.rig
from cortexloop.realtime.session import Session
from cortexloop.rig.config import build, load, parse

EXAMPLES = sorted((Path(cortexloop.rig.__file__).parent / "examples").glob("*.toml"))

EVOLUTION = {"name": "e", "kind": "evolution", "population": 8, "size": [16, 20], "dim": 30}
BASE: dict[str, Any] = {"session": {"name": "x", "folder": "s"}, "streams": [EVOLUTION]}


def save_pictures(folder: Path, n: int, size: tuple[int, int] = (16, 20)) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"picture{i}.png")


def test_the_first_lines_of_a_configuration(tmp_path: Path):
    path = tmp_path / "rig.toml"
    path.write_text('[session]\nname = "a"\nfolder = "kept"\nseed = 4\nrepeats = 2\n[[streams]]\nname = "e"\n'
                    'kind = "evolution"\nunits = ["u"]\n')  # fmt: skip
    config = load(path)
    assert config.folder == tmp_path / "kept"
    assert (config.settings.session, config.settings.seed, config.settings.repeats) == ("a", 4, 2)
    assert config.settings.streams[0].units == ["u"]
    assert config.secret() is None
    assert config.kept == {"streams": {"e": {"name": "e", "kind": "evolution", "units": ["u"]}}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"session": {"folder": "s"}}, "session.name should be given"),
        ({"session": {"name": "x"}}, "session.folder should be given"),
        ({"session": {"name": "a b", "folder": "s"}}, "session.name: expected str matching"),
        ({"session": {"name": "../a", "folder": "s", "seed": -1}}, "session."),
        ({"session": {"name": "a", "folder": "s", "within_ms": -3}}, "session.within_ms: expected float >= 0"),
        ({"session": {"name": "a", "folder": "s", "colour": 1}}, "unknown field colour"),
        ({"session": {"name": "a", "folder": "s", "streams": []}}, "session.streams is no field"),
        ({"session": {"name": "a", "folder": "s", "clock_units": {"c": 0}}}, "session.clock_units"),
        ({"streams": []}, "streams: expected array of length >= 1"),
        ({"streams": [{"name": "e", "kind": "magic"}]}, "streams[0].kind: invalid value 'magic'"),
        (
            {"streams": [EVOLUTION, {**EVOLUTION, "name": "f", "population": "8"}]},
            "streams[1].population: expected int",
        ),
        ({"streams": [{**EVOLUTION, "name": "../e"}]}, "streams[0].name: expected str matching"),
        ({"streams": [EVOLUTION, EVOLUTION]}, "two streams are called 'e'"),
        ({"server": {"secret": "short"}}, "server.secret: expected str of length >= 8"),
        ({"server": {"secret": "long enough", "secret_file": "x"}}, "both given"),
        ({"server": {"limits": {"clients": 0}}}, "server.limits.clients"),
        ({"exchange": {}}, "exchange: object missing required field images"),
        ({"music": 1}, "unknown field music"),
    ],
)
def test_a_mistake_is_named_by_its_field(change: dict[str, Any], says: str):
    with pytest.raises(ValueError) as caught:
        parse({**BASE, **change}, "rig.toml")
    assert str(caught.value).startswith("rig.toml: ")
    assert says in str(caught.value)
    gc.collect()


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        ({**EVOLUTION, "optimiser": "luck"}, "optimiser should be one of"),
        ({**EVOLUTION, "generator": "magic"}, "generator should be one of"),
        ({**EVOLUTION, "generator": "deepsim-fc6"}, "needs weights"),
        ({**EVOLUTION, "weights": "x"}, "takes no weights"),
        ({**EVOLUTION, "optimiser_options": {"luck": 7}}, "luck"),
        ({**EVOLUTION, "placement": {"canvas": [10, 10], "pixels_per_degree": 1.0, "size": -1.0}}, "size"),
        ({"name": "i", "kind": "images", "images": "nowhere", "per_batch": 4}, "no such file or folder"),
        ({"name": "s", "kind": "synthesis", "models": "textbook", "neurons": ["x"], "per_batch": 1, "batches": 1}, "x"),
        ({"name": "s", "kind": "screen", "models": "nowhere", "images": "x", "per_batch": 1}, "nowhere"),
    ],
)
def test_what_cannot_be_made_names_its_stream(tmp_path: Path, stream: dict[str, Any], says: str):
    config = parse({**BASE, "streams": [stream]}, tmp_path / "rig.toml")
    with pytest.raises((ValueError, OSError), match=r"stream|no such file|there is no") as caught:
        build(config)
    assert says in str(caught.value)


def test_files_that_are_no_configuration(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="there is no configuration"):
        load(tmp_path / "nothing.toml")
    (tmp_path / "bad.toml").write_text("[session\n")
    with pytest.raises(ValueError, match=r"bad\.toml is no TOML file"):
        load(tmp_path / "bad.toml")
    (tmp_path / "worse.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no TOML file"):
        load(tmp_path / "worse.toml")


def test_a_secret_in_a_file(tmp_path: Path):
    config = parse({**BASE, "server": {"secret_file": "secret.txt"}}, tmp_path / "rig.toml")
    with pytest.raises(ValueError, match="cannot be read"):
        config.secret()
    (tmp_path / "secret.txt").write_text("abc\n")
    with pytest.raises(ValueError, match="8 characters or more"):
        config.secret()
    (tmp_path / "secret.txt").write_text("correct horse\n")
    assert config.secret() == "correct horse"
    assert "secret" not in str(config.kept)


def test_streams_of_other_sizes_do_not_go_together(tmp_path: Path):
    other = {**EVOLUTION, "name": "f", "size": [16, 16]}
    with pytest.raises(ValueError, match="of one size, got 'e' 16 x 20, 'f' 16 x 16"):
        build(parse({**BASE, "streams": [EVOLUTION, other]}, tmp_path / "rig.toml"))


def test_two_evolutions_begin_with_different_images(tmp_path: Path):
    """Each stream has a seed of its own, unless it is given one."""
    streams = [EVOLUTION, {**EVOLUTION, "name": "f"}, {**EVOLUTION, "name": "g", "seed": 0}]
    sources, references = build(parse({**BASE, "streams": streams}, tmp_path / "rig.toml"))
    codes = [source.propose().codes for source in sources.values()]
    assert not np.array_equal(codes[0], codes[1])
    np.testing.assert_array_equal(codes[0], codes[2])
    assert references.shape == (0, 16, 20, 3)


def test_references_come_in_the_streams_size(tmp_path: Path):
    save_pictures(tmp_path / "refs", 3, (8, 8))
    raw = {**BASE, "references": {"images": "refs"}}
    with pytest.raises(ValueError, match=r"rig\.toml: references: image 'picture0\.png'"):
        build(parse(raw, tmp_path / "rig.toml"))
    raw["references"] = {"images": "refs", "resize": True}
    _, references = build(parse(raw, tmp_path / "rig.toml"))
    assert references.shape == (3, 16, 20, 3)


def test_streams_with_models(tmp_path: Path):
    save_pictures(tmp_path / "pictures", 5, (112, 112))
    common = {"models": "textbook", "neurons": ["curve_up", "corner"], "per_batch": 2}
    streams = [
        {"name": "screen", "kind": "screen", "images": "pictures", "refit": {"after": 4, "alphas": [1.0]}, **common},
        {"name": "synthesis", "kind": "synthesis", "batches": 2, "steps": 2, **common},
        {"name": "guided", "kind": "guided", "dim": 16, "budget_ms": 1.0, "chunk": 2, **common},
        {"name": "images", "kind": "images", "images": "pictures", "per_batch": 2},
    ]
    sources, _ = build(parse({**BASE, "streams": streams}, tmp_path / "rig.toml"))
    for source in sources.values():
        proposal = source.propose()
        assert proposal is not None
        assert proposal.render().shape == (2, 112, 112, 3)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_example_is_a_session(path: Path, tmp_path: Path):
    there = tmp_path / path.name
    there.write_text(path.read_text())
    for folder in ("references", "pictures"):
        save_pictures(tmp_path / folder, 2, (30, 30))
    (tmp_path / "rig-secret.txt").write_text("correct horse")
    config = load(there)
    config.secret()
    sources, references = build(config)
    with Session.create(config.folder, config.settings, sources, references, config=config.kept) as session:
        assert session.state == "ready"
    assert config.folder.is_relative_to(tmp_path)

"""Damaged and hostile model files: ValueError naming the file, or a valid model; nothing else, and nothing executed."""

from __future__ import annotations

import io as memory
import json
import os
import pickle
import random
import struct
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_formats import WRITERS, random_weights, write_npy

from cortexloop import io

SUFFIXES = (*WRITERS, ".safetensors")
CONTAINERS = (".npz", ".keras", ".pt")  # zip archives, whose checksums hide what they hold from plain bit flips


@lru_cache
def valid(suffix: str) -> bytes:
    """A small valid file of every format."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"m{suffix}"
        weights = random_weights("m", (2, 3, 2), (3, 3, 1), (2, 2, 2), (112, 112))
        if suffix == ".safetensors":
            io.save_models(path, [weights])
        else:
            WRITERS[suffix](path, weights)
        return path.read_bytes()


def refuse_or_read(suffix: str, data: bytes) -> bool:
    """Load bytes as a file; whether a valid model came out. Anything but ValueError fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"m{suffix}"
        path.write_bytes(data)
        message = ""
        try:
            models = io.load_models(path)
        except ValueError as error:
            models, message = [], str(error)
        assert models or message.startswith(f"{str(path)!r} cannot be read: ")
        for model in models:
            model.validate()
        return bool(models)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_undamaged_file_is_read(suffix):
    assert refuse_or_read(suffix, valid(suffix))


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300))
@example(data=b"")
@example(data=b"PK\x05\x06" + bytes(18))
@example(data=b"\x93NUMPY\x01\x00")
@example(data=b"\x89HDF\r\n\x1a\n" + bytes(100))
@example(data=b"\xff" * 64)
@example(data=b"\x02\0\0\0\0\0\0\0{}")
def test_random_bytes(suffix, data):
    assert not refuse_or_read(suffix, data)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncation_at_many_offsets(suffix):
    data = valid(suffix)
    rng = random.Random(1)
    offsets = {*range(0, 200, 7), *(rng.randrange(len(data)) for _ in range(80)), *range(len(data) - 60, len(data))}
    for offset in offsets:
        refuse_or_read(suffix, data[:offset])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_flipped_bits(suffix):
    data = valid(suffix)
    for i in range(300):
        refuse_or_read(suffix, damaged(data, random.Random(i)))


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A few changed bytes, mostly near the start or the end, where the structure is."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 6))):
        near = min(3000, len(out))
        place = rng.choice((rng.randrange(len(out)), rng.randrange(near), len(out) - 1 - rng.randrange(near)))
        out[place] = rng.choice((out[place] ^ (1 << rng.randrange(8)), 0, 255, rng.randrange(256)))
    return bytes(out)


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_flipped_bits_within_archives(suffix):
    with zipfile.ZipFile(memory.BytesIO(valid(suffix))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    # The structured members are hit more often than the plain numbers.
    structured = [name for name in members if name.endswith(("pkl", "json", "h5", "npy", "byteorder"))]
    for i in range(300):
        rng = random.Random(i)
        target = rng.choice(structured)
        changed = damaged(members[target], rng) if rng.random() < 0.8 else members[target][: rng.randrange(1000)]
        buffer = memory.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, changed if name == target else content)
        refuse_or_read(suffix, buffer.getvalue())


# --- pickles that would run code ------------------------------------------------------------------------------------


class Evil:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def npy(pickled: bytes, shape: str = "(8,)") -> bytes:
    header = f"{{'descr': '|O', 'fortran_order': False, 'shape': {shape}, }}"
    header = header.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + pickled


def pt(pickled: bytes) -> bytes:
    buffer = memory.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        archive.writestr("m/byteorder", "little")
        archive.writestr("m/data/0", bytes(64))
    return buffer.getvalue()


@pytest.mark.parametrize("wrap", [npy, pt])
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("nested", [False, True])
def test_pickled_calls_are_refused_and_not_made(tmp_path, wrap, protocol, nested):
    trap = tmp_path / "executed"
    suffix = ".npy" if wrap is npy else ".pt"
    for evil in (
        Evil(os.system, f"touch {trap}"),
        Evil(eval, f"open({str(trap)!r}, 'w').close()"),
        Evil(getattr, "text", "upper"),
        Evil(np.load, str(trap)),
    ):
        content = {"layers.Beta.bias": [evil]} if nested else evil
        assert not refuse_or_read(suffix, wrap(pickle.dumps(content, protocol)))
        assert not trap.exists()


def test_pickle_refusal_names_the_function(tmp_path):
    (tmp_path / "m.npy").write_bytes(npy(pickle.dumps(Evil(eval, "1"), 4)))
    with pytest.raises(ValueError, match=r"asks for builtins\.eval, which is refused"):
        io.load_models(tmp_path / "m.npy")


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x03cos\nsystem\n\x8c\x04true\x85R.",  # a call by name
        b"\x80\x03\x8c\x02os\x8c\x06system\x86\x8c\x04true\x85R.",  # a look-alike pair instead of a global
        b"(ios\nsystem\n.",  # INST
        b"(cos\nsystem\nX\x04\0\0\0trueo.",  # OBJ
        b"\x80\x02\x82\x01.",  # a registered extension
        b"cnumpy\nndarray\n)\x81.",  # NEWOBJ
        b"cnumpy\nndarray\n}b.",  # BUILD on a name
        b"cnumpy\nndarray\n)R.",  # a call of what is only to be mentioned
        b"]r\xff\xff\xff\xff.",  # a memo entry number 2**32 - 1: no table of that size
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.",  # 2**63 bytes that are not there
        b"\x8b\xff\xff\xff\x7f1.",  # an integer of 2**31 bytes that are not there
        b"(((((",
        b".",
        b"N.",
        b"]a.",
        b"0.",
        b"}]]s.",
        b"h\x05.",
        b"]" + b"q\0h\0h\0\x86" * 3000 + b".",  # deeply nested tuples
    ],
)
def test_odd_pickles_are_refused(program):
    assert not refuse_or_read(".npy", npy(program))
    assert not refuse_or_read(".pt", pt(program))


def test_nested_references_do_not_explode():
    # Every tuple holds the previous one twice: 2**200 leaves if anything walked or printed them.
    nested = b"\x80\x03K\x01" + b"q\0h\0\x86" * 200 + b"q\x01"
    text, dtype = b"\x8c\x07storage", b"cnumpy\ndtype\n"
    for program in (
        b".",
        b")R.",  # called
        b"}h\x01b.",  # built on
        b"}h\x01K\x01s.",  # a key
        dtype + b"h\x01\x85R.",  # a type code
        dtype + b"\x8c\x02f4\x85Rh\x01b.",  # the state of a type
        b"(" + text + b"h\x01h\x01h\x01K\x01tQ.",  # a storage of torch
        b"(" + b"h\x01" * 5 + b"tQ.",
    ):
        assert not refuse_or_read(".npy", npy(nested + program))
        assert not refuse_or_read(".pt", pt(nested + program))


# --- absurd sizes ---------------------------------------------------------------------------------------------------


def test_declared_sizes_are_not_believed():
    huge = "(999999999999, 999999999)"
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {huge}, }}".ljust(117) + "\n"
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(64)
    assert not refuse_or_read(".npy", array)
    buffer = memory.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("m/readout/kernel.npy", array)
        archive.writestr("m/readout/bias.npy", array)
        archive.writestr("m/layer0/bias.npy", array)
    assert not refuse_or_read(".npz", buffer.getvalue())
    shape = pickle.dumps((1, (10**12, 10**12)))
    assert not refuse_or_read(".npy", npy(shape, "(999999999999,)"))
    for length in (2**63, 2**40, 2**20):
        assert not refuse_or_read(".safetensors", struct.pack("<Q", length) + b"{}")


def test_safetensors_offsets_are_not_believed(tmp_path):
    data = valid(".safetensors")
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for offsets in ([0, 2**60], [0, 2**40], [-4, 0], [8, 4], [0, True], [0.0, 4.0], "ab", [0]):
        header["m/layer0/kernel"]["data_offsets"] = offsets
        text = json.dumps(header).encode()
        assert not refuse_or_read(".safetensors", struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_a_zip_bomb_is_refused_by_its_declared_size(tmp_path, monkeypatch):
    monkeypatch.setattr("cortexloop.io._archive.MAX_MODEL_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"N.")
        for i in range(5):
            archive.writestr(f"m/data/{i}", bytes(2**18))
    assert (tmp_path / "m.pt").stat().st_size < 2**14
    with pytest.raises(ValueError, match="claims 1310722 bytes for one model, and more than 1048576"):
        io.load_models(tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/readout/kernel.npy", bytes(2**21))
    with pytest.raises(ValueError, match="claims 2097152 bytes for one model"):
        io.load_models(tmp_path / "m.npz")
    with (tmp_path / "m.npy").open("wb") as file:  # a sparse file: large, and never read
        file.truncate(2**40)
    with pytest.raises(ValueError, match="claims 1099511627776 bytes"):
        io.load_models(tmp_path / "m.npy")


def test_a_zip_member_that_unpacks_to_more_than_it_declares(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/readout/kernel.npy", bytes(2**24))
    data = (tmp_path / "m.npz").read_bytes()
    lie = data.replace(struct.pack("<I", 2**24), struct.pack("<I", 100))
    assert lie != data
    assert not refuse_or_read(".npz", lie)


def test_tensors_beyond_their_storage_are_refused(tmp_path):
    import torch

    state = {"layers.Beta.bias": torch.zeros(4)}
    buffer = memory.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(memory.BytesIO(buffer.getvalue())) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name, content in members.items():
        if name.endswith("data/0"):
            short = {**members, name: content[:4]}
    out = memory.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in short.items():
            archive.writestr(name, content)
    (tmp_path / "m.pt").write_bytes(out.getvalue())
    with pytest.raises(ValueError, match="larger than its storage"):
        io.load_models(tmp_path / "m.pt")


def test_unreadable_files_are_said(tmp_path, monkeypatch):
    write_npy(tmp_path / "m.npy", random_weights("m"))

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(ValueError, match=r"m\.npy' cannot be read: Permission denied"):
        io.load_models(tmp_path / "m.npy")

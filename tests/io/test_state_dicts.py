"""Weights in torch's two formats and in safetensors. Damaged files end in ValueError, and nothing is executed."""

from __future__ import annotations

import io as memory
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cortexloop import io

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])


def saved(path: Path, content: object, zipped: bool) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    plain = torch.randn(3, 4, generator=generator)
    return {
        "float": plain,
        "double": plain.double(),
        "half": plain.half(),
        "bfloat16": plain.bfloat16(),
        "int": torch.arange(5, dtype=torch.int32),
        "long": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "transposed": plain.t(),
        "part": plain[1:, ::2],
        "number": torch.tensor(2.5),
        "nothing": torch.zeros(0, 3),
    }


@FORMATS
def test_every_type_and_layout(tmp_path: Path, zipped: bool):
    expected = tensors()
    found = io.load_state_dict(saved(tmp_path / "w.pt", expected, zipped))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        array = tensor.float().numpy() if name == "bfloat16" else tensor.numpy()
        np.testing.assert_array_equal(found[name], array, strict=True)


@FORMATS
def test_a_network_nested_among_other_things(tmp_path: Path, zipped: bool):
    network = nn.Sequential(OrderedDict(conv=nn.Conv2d(2, 3, 3), norm=nn.BatchNorm2d(3)))
    state = network.state_dict()
    content = {"model": {"net": state}, "same": {"net": state}, "epoch": 3, "rates": [0.1, 0.2], "note": None}
    found = io.load_state_dict(saved(tmp_path / "w.pth", content, zipped))
    assert set(found) == {f"model.net.{key}" for key in state}
    np.testing.assert_array_equal(found["model.net.conv.weight"], network.conv.weight.detach().numpy())
    parameters = io.load_state_dict(saved(tmp_path / "p.pth", dict(network.named_parameters()), zipped))
    np.testing.assert_array_equal(parameters["conv.bias"], network.conv.bias.detach().numpy())


@FORMATS
def test_tensors_that_share_memory(tmp_path: Path, zipped: bool):
    whole = torch.arange(12.0)
    found = io.load_state_dict(saved(tmp_path / "w.pt", {"a": whole[:4], "b": whole[4:].view(2, 4)}, zipped))
    np.testing.assert_array_equal(found["a"], np.arange(4))
    np.testing.assert_array_equal(found["b"], np.arange(4, 12).reshape(2, 4))


@FORMATS
def test_tensors_in_lists_are_left_out(tmp_path: Path, zipped: bool):
    content = {"momenta": [torch.ones(3), torch.zeros(2)], "weight": torch.full((2,), 7.0)}
    found = io.load_state_dict(saved(tmp_path / "w.pt", content, zipped))
    assert list(found) == ["weight"]
    np.testing.assert_array_equal(found["weight"], [7, 7])


def test_safetensors(tmp_path: Path):
    expected = {"a.weight": torch.randn(2, 3), "b": torch.randn(4).half()}
    save_file(expected, tmp_path / "w.safetensors")
    found = io.load_state_dict(tmp_path / "w.safetensors")
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), strict=True)


def test_big_endian_files_of_both_formats(tmp_path: Path):
    zipped = saved(tmp_path / "w.pt", {"a": torch.tensor([1.0, 256.0])}, True)
    with zipfile.ZipFile(zipped) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else content)
    np.testing.assert_array_equal(
        io.load_state_dict(tmp_path / "big.pt")["a"], np.array([1, 256], "<f4").view(">f4").astype("f4")
    )


# --- refusals -------------------------------------------------------------------------------------------------------


@FORMATS
def test_a_pickled_network_is_refused(tmp_path: Path, zipped: bool):
    path = saved(tmp_path / "w.pt", nn.Linear(2, 2), zipped)
    with pytest.raises(ValueError, match=r"w\.pt.*asks for torch\.nn\.modules\.linear\.Linear, which is refused"):
        io.load_state_dict(path)


@pytest.mark.parametrize("content", [{"epoch": 1}, [torch.ones(2)], torch.ones(2), 3])
def test_no_state_dictionary(tmp_path: Path, content: object):
    with pytest.raises(ValueError, match="holds no tensors by name; save the state_dict"):
        io.load_state_dict(saved(tmp_path / "w.pt", content, True))


def test_other_files(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        io.load_state_dict(tmp_path / "none.pt")
    for content in (b"", b"hello, this is no file of weights", b"PK\x03\x04 broken"):
        (tmp_path / "w.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"w\.pt' cannot be read"):
            io.load_state_dict(tmp_path / "w.pt")
    with (tmp_path / "w.pt").open("wb") as file:  # a sparse file: large, and never read
        file.truncate(2**31)
    with pytest.raises(ValueError, match="2147483648 bytes, and more than 1073741824 are not read"):
        io.load_state_dict(tmp_path / "w.pt")


class Evil:
    """Pickles as a call of any function."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def wrapped(pickled: bytes, zipped: bool) -> bytes:
    """A file of weights around a pickle."""
    if zipped:
        buffer = memory.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("m/data.pkl", pickled)
            archive.writestr("m/data/0", bytes(64))
        return buffer.getvalue()
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = [0x1950A86A20F9469CFC6C, 1001, machine]
    return b"".join(pickle.dumps(value, 2) for value in head) + pickled + pickle.dumps([], 2)


@FORMATS
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_is_executed(tmp_path: Path, zipped: bool, protocol: int):
    trap = tmp_path / "executed"
    for evil in (Evil(os.system, f"touch {trap}"), Evil(eval, f"open({str(trap)!r}, 'w').close()")):
        for content in (evil, {"weight": evil}):
            (tmp_path / "w.pt").write_bytes(wrapped(pickle.dumps(content, protocol), zipped))
            with pytest.raises(ValueError, match=r"refused|which plain arrays do not need"):
                io.load_state_dict(tmp_path / "w.pt")
            assert not trap.exists()


STORAGE = b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpuK\x10tQ"


@pytest.mark.parametrize(
    "tensor",
    [
        b"K\0(K\x05K\x05t(K\x05K\x01t",  # 25 of 16 numbers
        b"K\x0a(K\x0at(K\x01t",  # past the end
        b"K\0(K\x02t(K\x63t",  # a step past the end
        b"K\0(K\x02t)",  # no strides
        b"\x8c\x01a(K\x02t(K\x01t",  # an offset of text
        b"J\xff\xff\xff\xff(K\x02t(K\x01t",  # a negative offset
        b"K\0(J\xff\xff\xff\x7fJ\xff\xff\xff\x7fJ\xff\xff\xff\x7ft(K\0K\0K\0t",  # 2**93 numbers by strides of 0
    ],
)
def test_tensors_that_reach_beyond_their_storage(tmp_path: Path, tensor: bytes):
    program = b"\x80\x02}\x8c\x06weightctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + tensor + b"\x89}tRs."
    (tmp_path / "w.pt").write_bytes(wrapped(program, True))
    with pytest.raises(ValueError, match=r"damaged tensor|larger than its storage|claims more than"):
        io.load_state_dict(tmp_path / "w.pt")


def test_dictionaries_that_refer_to_themselves_or_often_to_others(tmp_path: Path):
    (tmp_path / "w.pt").write_bytes(wrapped(b"\x80\x02}q\0\x8c\x01ah\0s.", True))
    with pytest.raises(ValueError, match="holds no tensors"):
        io.load_state_dict(tmp_path / "w.pt")
    often: dict[str, object] = {}
    for _ in range(50):  # 100**50 names if anything walked them all
        often = {str(i): often for i in range(100)}
    (tmp_path / "w.pt").write_bytes(wrapped(pickle.dumps(often, 2), True))
    with pytest.raises(ValueError, match="holds no tensors"):
        io.load_state_dict(tmp_path / "w.pt")


@lru_cache
def valid(kind: str) -> bytes:
    content = {"net": {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2).half()}}
    if kind == "safetensors":
        from safetensors.torch import save

        return save(content["net"])
    buffer = memory.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


def readable(path: Path, data: bytes) -> bool:
    """Whether the bytes are read as weights; anything but ValueError fails the test."""
    path.write_bytes(data)
    found, message = {}, ""
    try:
        found = io.load_state_dict(path)
    except ValueError as error:
        message = str(error)
    assert found or message.startswith(f"{str(path)!r} cannot be read: ")
    return bool(found)


@pytest.mark.parametrize("kind", ["zip", "before 1.6", "safetensors"])
def test_damaged_files(tmp_path: Path, kind: str):
    data, path = valid(kind), tmp_path / "w"
    assert readable(path, data)
    for end in [*range(0, min(len(data), 900), 13), len(data) - 1]:
        readable(path, data[:end])
    for seed in range(400):
        rng = random.Random(seed)
        changed = bytearray(data)
        for _ in range(rng.choice((1, 2, 6))):
            changed[rng.randrange(len(data))] = rng.choice((0, 255, rng.randrange(256)))
        readable(path, bytes(changed))


def test_damaged_pickles_within_an_archive(tmp_path: Path):
    with zipfile.ZipFile(memory.BytesIO(valid("zip"))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    program = next(name for name in members if name.endswith("data.pkl"))
    for seed in range(400):
        rng = random.Random(seed)
        changed = bytearray(members[program])
        for _ in range(rng.choice((1, 1, 2, 6))):
            changed[rng.randrange(len(changed))] = rng.choice((0, 255, rng.randrange(256)))
        buffer = memory.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, bytes(changed) if name == program else content)
        readable(tmp_path / "w", buffer.getvalue())


def test_sizes_of_old_files_are_not_believed(tmp_path: Path):
    data = valid("before 1.6")
    position = data.rfind(struct.pack("<q", 6) + np.arange(6, dtype="<f4").tobytes())
    assert position > 0
    for count in (2**62, -1, 5, 7):
        changed = data[:position] + struct.pack("<q", count) + data[position + 8 :]
        assert not readable(tmp_path / "w.pt", changed)

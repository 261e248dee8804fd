from __future__ import annotations

import errno
import os
import stat

import pytest

from cortexloop.io import atomic_path


def write(path, content=b"half", error=None):
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
        if error is not None:
            raise error


def test_writes_and_leaves_nothing_beside(tmp_path):
    target = tmp_path / "bank.safetensors"
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".safetensors"
        temporary.write_bytes(b"abc")
        assert not target.exists()
    assert target.read_bytes() == b"abc"
    assert os.listdir(tmp_path) == ["bank.safetensors"]


@pytest.mark.parametrize("error", [RuntimeError("interrupted"), KeyboardInterrupt("interrupted")], ids=repr)
def test_a_failure_keeps_the_old_file_and_removes_the_new_one(tmp_path, error):
    target = tmp_path / "out.npz"
    target.write_bytes(b"old")
    with pytest.raises(type(error), match="interrupted"):
        write(target, error=error)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.npz"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_left_is_one_sentence_and_leaves_nothing(tmp_path, code):
    with pytest.raises(OSError, match=r"no space left on the disk of .*out\.npz") as caught:
        write(tmp_path / "out.npz", error=OSError(code, "write failed"))
    assert caught.value.errno == code
    assert os.listdir(tmp_path) == []


def test_no_space_left_for_the_last_bytes(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path / "out.npz")
    assert os.listdir(tmp_path) == []


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.* does not exist"):
        write(tmp_path / "nowhere" / "a.npz")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        write(tmp_path)


def test_no_permission_is_named(tmp_path, monkeypatch):
    def refused(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x"))

    monkeypatch.setattr("cortexloop.io.atomic.tempfile.mkstemp", refused)  # root, as in containers, may write anywhere
    with pytest.raises(PermissionError, match=r"no permission to write .*a\.npz"):
        write(tmp_path / "a.npz")


def test_permissions_are_those_of_open(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    write(tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    plain.chmod(0o440)
    write(plain)
    assert stat.S_IMODE(plain.stat().st_mode) == 0o440

"""What the files say: environment variables, words that must not appear, and sizes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from project import PACKAGE, ROOT, tracked_files

ENVIRONMENT = {"CORTEXLOOP_ISA", "CORTEXLOOP_NUM_THREADS", "CORTEXLOOP_V4_DATA"}

BINARY = {".png", ".svg", ".gif", ".npz", ".npy", ".safetensors", ".h5", ".jpg"}
LARGEST = 512 * 1024


def environment_names(folder: Path) -> set[str]:
    """Names in string literals that are read from the environment, in Python and C++."""
    found = set()
    for path in folder.rglob("*"):
        if path.suffix in (".py", ".cpp", ".h"):
            text = path.read_text(encoding="utf-8")
            found |= set(
                re.findall(r"""(?:environ(?:\.get|\.pop|\.setdefault)?[\[(]|getenv\()\s*["'](\w+)["']""", text)
            )
            found |= set(re.findall(r"""["'](CORTEXLOOP_\w+)["']""", text))
    return found


def test_environment_variables_are_few_and_documented():
    read = environment_names(PACKAGE) | environment_names(ROOT / "csrc")
    assert read <= ENVIRONMENT, f"not in the allow-list: {sorted(read - ENVIRONMENT)}"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {name for name in ENVIRONMENT if name not in readme} == set(), "README.md should say what they do"


def text_files() -> list[tuple[str, str]]:
    """(path, text) of every tracked text file but this one, which has to name what it forbids."""
    here = Path(__file__).resolve()
    return [
        (str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
        for path in tracked_files()
        if path.suffix not in BINARY and path.resolve() != here
    ]


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("unfinished work", r"\b(?:TODO|FIXME|XXX|HACK)\b"),
        ("a path of one machine", r"(?<![\w.])/(?:work|home|root|Users|tmp)/\w"),
        ("a package index", r"(?:extra-)?index-url|find-links|pypi\.org/simple|download\.pytorch\.org"),
        ("a merge conflict", r"^(?:<{7}|>{7}) "),
    ],
)
def test_nothing_unfinished_or_local(what: str, pattern: str):
    found = [
        f"{name}: {match[0]!r}" for name, text in text_files() for match in re.finditer(pattern, text, re.MULTILINE)
    ]
    assert found == [], what


def test_tracked_files_are_small():
    large = {str(p.relative_to(ROOT)): p.stat().st_size for p in tracked_files() if p.stat().st_size > LARGEST}
    assert large == {}


def test_no_published_data_or_build_products_are_tracked():
    """The V4 data pack has another licence and stays outside; compiled files are made at install time."""
    names = [str(p.relative_to(ROOT)) for p in tracked_files()]
    pattern = re.compile(r"v4_compact|\.(?:so|pyd|dylib|o|whl|pyc|keras|pt|zip)$|(?:^|/)(?:build|dist)/")
    assert [name for name in names if pattern.search(name)] == []


def test_commands_in_the_readme():
    """The two commands by which people set up, letter by letter, each alone on its line."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert "pip install . && cortexloop demo" in lines
    assert 'pip install ".[test]" && pytest' in lines

"""The guide's tables of experiments say what was recorded, and the experiments' own arithmetic is right."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
from project import ROOT

EXPERIMENTS = {
    "recovery": ("evidence_recovery", "text", "factor-models.md"),
    "v4-sessions": ("evidence_sessions", "text", "factor-models.md"),
    "optimal-images": ("evidence_images", "text", "factor-models.md"),
    "shared-features": ("evidence_saliency", "text", "factor-models.md"),
    "rig-kills": ("evidence_rig", "kills_text", "rig.md"),
    "rig-latency": ("evidence_rig", "latency_text", "rig.md"),
}


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The experiments live beside the package and are run as scripts."""
    folder = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_tables_of_the_guide_are_made_from_recorded_numbers(benchmarks: Path, name: str):
    evidence = importlib.import_module("evidence")
    experiment, function, guide = EXPERIMENTS[name]
    text = getattr(importlib.import_module(experiment), function)
    document = (ROOT / "docs" / guide).read_text(encoding="utf-8")
    assert evidence.with_part(document, name, text(evidence.read_results(name))) == document


def test_area_under_the_curve(benchmarks: Path, rng: np.random.Generator):
    auc = importlib.import_module("evidence_saliency").auc
    inside = np.zeros((8, 8), bool)
    inside[2:4, 2:5] = True
    values = rng.random((8, 8))
    pairs = values[inside][:, None] > values[~inside][None]
    assert auc(values, inside) == pytest.approx(pairs.mean())
    assert auc(np.where(inside, 2 + values, values), inside) == 1.0


def test_objects_show_the_part_where_they_say(benchmarks: Path, rng: np.random.Generator):
    saliency = importlib.import_module("evidence_saliency")
    images = np.full((4, 112, 112, 3), 128, np.uint8)
    images[:2] = rng.integers(0, 256, size=(2, 112, 112, 3), dtype=np.uint8)
    world = saliency.make_world(images, 3, rng)
    image, region = saliency.make_image(world, 0, [1], 0, rng)
    assert region.sum() == saliency.PART**2
    assert (image[~region] == 128).all()
    assert (image[region] != 128).any()

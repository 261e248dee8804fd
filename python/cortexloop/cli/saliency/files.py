"""Saliency maps as files: all numbers in one archive, and a picture of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from cortexloop.cli.evolution.store import file_stem
from cortexloop.cli.overlays import overlay
from cortexloop.cli.saliency.findings import SaliencyFindings

MAPS, OVERLAYS = "maps.npz", "overlays"


def write_files(findings: SaliencyFindings, folder: Path) -> None:
    """Write maps.npz and overlays/ into the folder."""
    rows = []
    pictures = folder / OVERLAYS
    pictures.mkdir()
    for i, neuron in enumerate(findings.neurons):
        for one in neuron.explained:
            name = f"{file_stem(i, neuron.name, one.name)}.png"
            _save(pictures / name, np.concatenate([one.pixels, overlay(one.pixels, one.map)], axis=1))
            rows.append((neuron.name, one.name, one.response, one.map))
        for query in neuron.comparisons:
            for pair in query.pairs:
                reference = pair.reference
                name = f"{file_stem(i, neuron.name, query.name, reference.name)}.png"
                parts = [query.pixels, overlay(query.pixels, pair.query)]
                parts += [overlay(reference.pixels, reference.map), reference.pixels]
                _save(pictures / name, np.concatenate(parts, axis=1))
    compared = [(n.name, q, p) for n in findings.neurons for q in n.comparisons for p in q.pairs]
    if compared:
        arrays = {
            "neurons": np.array([name for name, _, _ in compared]),
            "images": np.array([query.name for _, query, _ in compared]),
            "references": np.array([pair.reference.name for _, _, pair in compared]),
            "responses": np.array([query.response for _, query, _ in compared]),
            "reference_responses": np.array([pair.reference.response for _, _, pair in compared]),
            "similarity": np.array([pair.similarity for _, _, pair in compared]),
            "maps": np.stack([pair.query for _, _, pair in compared]).astype(np.float32),
            "reference_maps": np.stack([pair.reference.map for _, _, pair in compared]).astype(np.float32),
        }
    else:
        arrays = {
            "neurons": np.array([row[0] for row in rows]),
            "images": np.array([row[1] for row in rows]),
            "responses": np.array([row[2] for row in rows]),
            "maps": np.stack([row[3] for row in rows]).astype(np.float32),
        }
    np.savez_compressed(folder / MAPS, **arrays)  # type: ignore[arg-type]


def _save(path: Path, pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    Image.fromarray(pixels).save(path)

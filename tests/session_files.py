"""Sessions on the disk for tests: records of every kind, and folders with a journal and images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cortexloop.realtime.journal import FORMAT, Journal
from cortexloop.realtime.messages import Event, Item, Tell
from cortexloop.realtime.pixels import PixelStore
from cortexloop.realtime.records import (
    Array,
    BatchMade,
    ClockMapping,
    Closed,
    Control,
    OnsetFound,
    Opened,
    Record,
    Served,
    ShownEvents,
    Start,
    Told,
    Update,
)

SHAPE = (6, 8, 3)
UNITS = ["a", "b"]
IMAGES = 4
REFERENCES = 2
BEGUN = 1_700_000_000_000_000_000


def start(**changes) -> Start:
    """A first record."""
    fields = {
        "mono_ns": 5, "wall_ns": BEGUN, "format": FORMAT, "session": "monkey-1", "config": {"settings": {}},
        "config_sha": "0" * 64, "sources": {"evo": {"kind": "test"}}, "environment": {"host": "rig"},
        "references": [], "image_shape": SHAPE,
    }  # fmt: skip
    return Start(**{**fields, **changes})


def note(number: int, size: int = 0) -> Control:
    """A small record, or one of about `size` bytes."""
    return Control(mono_ns=number, wall_ns=BEGUN + number, what="note", text=f"{number} " + "x" * size)


class Clock:
    """Counts milliseconds, one for each record."""

    def __init__(self) -> None:
        self.ms = 0

    def __call__(self) -> dict[str, int]:
        self.ms += 1
        return {"mono_ns": self.ms * 1_000_000, "wall_ns": BEGUN + self.ms * 1_000_000}


def response(generation: int, presentation: int, unit: int) -> float:
    """What a unit answered: an exact number, different everywhere."""
    return generation * 100 + presentation + unit / 4


def write_session(folder: Path, generations: int = 3, *, close: bool = True) -> list[Record]:
    """A sound session: in each generation two references and four images, once each, all told one by one.

    In generation 1, presentation 3 went wrong and was shown again; its last image stayed without a response and a
    filler was shown meanwhile.
    """
    rng = np.random.default_rng(7)
    folder.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    records: list[Record] = []
    with PixelStore(folder, SHAPE) as pixels:
        references = pixels.put(rng.integers(0, 256, (REFERENCES, *SHAPE), dtype=np.uint8))
        records += [start(references=references), Opened(pid=1, host="rig", environment={}, **clock())]
        for generation in range(generations):
            images = rng.integers(0, 256, (IMAGES, *SHAPE), dtype=np.uint8)
            shas = [*references, *pixels.put(images)]
            records += _generation(clock, generation, shas, rng.normal(size=(IMAGES, 5)).astype(np.float32))
        pixels.sync()
    records.append(Control(what="note", text="water, 20 ml", id="n-1", client="ml", **clock()))
    if close:
        records.append(Closed(**clock()))
    with Journal.create(folder, records[0]) as journal:
        for record in records[1:]:
            journal.append(record)
            journal.sync()
    return records


def _items(generation: int, shas: list[str]) -> list[Item]:
    return [
        Item(
            item_id=f"ref-{i}" if i < REFERENCES else f"evo-{generation:04d}-{i - REFERENCES:03d}",
            kind="ref" if i < REFERENCES else "gen", sha=sha[:16], stream=None if i < REFERENCES else "evo",
            label=None if i < REFERENCES else f"picture {i}",
        )
        for i, sha in enumerate(shas)
    ]  # fmt: skip


def _generation(clock: Clock, generation: int, shas: list[str], codes: np.ndarray) -> list[Record]:
    name = f"evo-{generation:04d}"
    items = _items(generation, shas)
    order = [1, 0, 3, 2, 5, 4]
    made = BatchMade(
        batch_id=name, stream="evo", generation=generation, batch_kind="gen", items=items, shas=shas, order=order,
        pres_ids=[f"{name}.{k:04d}" for k in range(len(order))], codes=Array.of(codes), **clock(),
    )  # fmt: skip
    records: list[Record] = [made, Served(batch_id=name, client="ml", late_ms=1.5 * generation, **clock())]
    failed = {3} if generation == 1 else set()
    records += _show(clock, made, failed)
    scores = np.array([_mean(generation, order.index(i)) for i in range(REFERENCES, len(items))])
    if failed:
        records += _filler(clock, items[:REFERENCES], shas[:REFERENCES])
        again = BatchMade(
            batch_id=f"{name}-r1", stream="evo", generation=generation, batch_kind="repair", items=[items[2]],
            shas=[shas[2]], order=[0], pres_ids=[f"{name}-r1.0000"], repairs=name, **clock(),
        )  # fmt: skip
        records += [again, *_show(clock, again, {0})]
        scores[0] = np.nan
    records += [
        Update(stream="evo", batch_id=name, scores=Array.of(scores), digest=f"{generation:064x}", **clock()),
        ClockMapping(
            id=f"c-{generation}", client="ml", clock="ptb", exchanges=[(1, 11, 12, 4), (5, 15, 16, 7)], at_ns=5,
            offset_ns=9, drift_ppm=0.5, uncertainty_ns=1.0, **clock(),
        ),
    ]  # fmt: skip
    return records


def _filler(clock: Clock, items: list[Item], shas: list[str]) -> list[Record]:
    miss = Control(what="deadline_miss", text="no batch was ready", **clock())
    filler = BatchMade(
        batch_id="filler-0000", stream=None, generation=0, batch_kind="filler", items=items, shas=shas, order=[1, 0],
        pres_ids=["filler-0000.0000", "filler-0000.0001"], **clock(),
    )  # fmt: skip
    return [miss, filler, *_show(clock, filler, set())]


def _mean(generation: int, presentation: int) -> float:
    return float(np.mean([response(generation, presentation, unit) for unit in range(len(UNITS))]))


def _show(clock: Clock, made: BatchMade, failed: set[int]) -> list[Record]:
    """The report of a batch and one tell for each presentation."""
    events = [
        Event(
            pres_id=pres, outcome="no_fix" if k in failed else "ok", t_on=clock.ms / 1000 + k / 10,
            t_off=clock.ms / 1000 + k / 10 + 0.05, clock="ptb", diode=30 * clock.ms + k, acquisition="oe",
        )
        for k, pres in enumerate(made.pres_ids)
    ]  # fmt: skip
    onsets = [OnsetFound(t_ns=1000 + k, by="photodiode", uncertainty_ns=2.0) for k in range(len(events))]
    records: list[Record] = [ShownEvents(id=f"s-{made.batch_id}", client="ml", events=events, onsets=onsets, **clock())]
    for k, (pres, index) in enumerate(zip(made.pres_ids, made.order, strict=True)):
        if k in failed:
            continue
        header = Tell(
            id=f"t-{pres}", batch_id=made.batch_id, item_ids=[made.items[index].item_id], units=UNITS, pres_ids=[pres],
            window_ms=(50.0, 200.0),
        )  # fmt: skip
        values = np.array([[response(made.generation, k, unit) for unit in range(len(UNITS))]], np.float32)
        records.append(Told(client="oe", header=header, responses=Array.of(values), **clock()))
    return records

"""The tables of a session: what was shown when, what was responded, what was learned; one row at a time.

Raw times stay what the rig's clocks said. NaN and what is not known are None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cortexloop.realtime.records import Opened
from cortexloop.rig.history import History

Kind = Literal["text", "integer", "real", "truth", "number"]
"""Of a column. A "number" is all integers in one session and has fractions in another: a rig's own clock."""
Row = tuple[Any, ...]


@dataclass(frozen=True)
class Table:
    """A table that makes its rows anew each time it is asked.

    Attributes:
        name: also of its file.
        about: one line.
        columns: name and kind of each.
        rows: from first to last.
    """

    name: str
    about: str
    columns: Sequence[tuple[str, Kind]]
    rows: Callable[[], Iterator[Row]]

    def kinds(self) -> list[Kind]:
        """The kind of each column, with every "number" decided by what is in it."""
        kinds = [kind for _, kind in self.columns]
        open_columns = [i for i, kind in enumerate(kinds) if kind == "number"]
        fractions: set[int] = set()
        if open_columns:
            for row in self.rows():
                fractions.update(i for i in open_columns if isinstance(row[i], float) or _beyond_int64(row[i]))
        return ["real" if i in fractions else "integer" if i in open_columns else k for i, k in enumerate(kinds)]


def _beyond_int64(value: Any) -> bool:
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def tables(history: History) -> list[Table]:
    """All tables of a session."""
    return [
        Table("batches", "one row per batch", _BATCHES, lambda: _batches(history)),
        Table("items", "one row per image and batch", _ITEMS, lambda: _items(history)),
        Table("presentations", "one row per presentation", _PRESENTATIONS, lambda: _presentations(history)),
        Table("responses", "one row per response told and unit", _RESPONSES, lambda: _responses(history)),
        Table("clocks", "one row per estimate of a rig's clock", _CLOCKS, lambda: _clocks(history)),
        Table("exchanges", "the exchanges behind the estimates", _EXCHANGES, lambda: _exchanges(history)),
        Table("notes", "notes, pauses, faults and all else that happened", _NOTES, lambda: _notes(history)),
    ]


_BATCHES: list[tuple[str, Kind]] = [
    ("batch_id", "text"), ("number", "integer"), ("stream", "text"), ("generation", "integer"), ("batch_kind", "text"),
    ("repairs", "text"), ("items", "integer"), ("references", "integer"), ("presentations", "integer"),
    ("made_wall_ns", "integer"), ("made_mono_ns", "integer"), ("served_wall_ns", "integer"), ("served_to", "text"),
    ("late_ms", "real"), ("responded", "integer"), ("in_vain", "integer"), ("learned", "truth"),
    ("score_mean", "real"), ("score_best", "real"), ("scores_missing", "integer"), ("reference_mean", "real"),
    ("digest", "text"),
]  # fmt: skip


def _batches(history: History) -> Iterator[Row]:
    for batch in history.batches.values():
        made, served, update = batch.made, batch.served, batch.update
        told = list(batch.state.told.values())
        scores = np.array([]) if update is None else update.scores.numpy()
        known = scores[np.isfinite(scores)]
        yield (
            made.batch_id, batch.state.number, made.stream, made.generation, made.batch_kind,
            made.repairs, len(made.items), batch.count("ref"), len(made.order),
            made.wall_ns, made.mono_ns, served and served.wall_ns, served and served.client,
            served and served.late_ms, sum(x is not None for x in told), sum(x is None for x in told),
            update is not None,
            float(known.mean()) if len(known) else None, float(known.max()) if len(known) else None,
            None if update is None else len(scores) - len(known), history.reference_mean(batch),
            update and update.digest,
        )  # fmt: skip


_ITEMS: list[tuple[str, Kind]] = [
    ("item_id", "text"), ("batch_id", "text"), ("stream", "text"), ("generation", "integer"), ("batch_kind", "text"),
    ("item_kind", "text"), ("label", "text"), ("sha", "text"), ("presentations", "integer"), ("responded", "integer"),
    ("response_mean", "real"), ("score", "real"),
]  # fmt: skip


def _items(history: History) -> Iterator[Row]:
    for batch in history.batches.values():
        made = batch.made
        scores: dict[str, float] = {}
        if batch.update is not None:
            generated = [item.item_id for item in made.items if item.kind == "gen"]
            scores = dict(zip(generated, batch.update.scores.numpy().tolist(), strict=False))
        for item, sha in zip(made.items, made.shas, strict=False):
            responses = history.of_item(batch, item.item_id)
            yield (
                item.item_id, made.batch_id, item.stream, made.generation, made.batch_kind,
                item.kind, item.label, sha, len(batch.state.presentations[item.item_id]), len(responses),
                float(np.mean([values.mean() for values in responses])) if responses else None,
                _real(scores.get(item.item_id)),
            )  # fmt: skip


_PRESENTATIONS: list[tuple[str, Kind]] = [
    ("pres_id", "text"), ("batch_id", "text"), ("stream", "text"), ("generation", "integer"), ("batch_kind", "text"),
    ("position", "integer"), ("item_id", "text"), ("item_kind", "text"), ("label", "text"), ("sha", "text"),
    ("outcome", "text"), ("t_on", "number"), ("t_off", "number"), ("clock", "text"), ("frame", "integer"),
    ("missed", "integer"), ("diode", "number"), ("ttl", "number"), ("acquisition", "text"), ("onset_ns", "integer"),
    ("onset_by", "text"), ("onset_uncertainty_ns", "real"), ("onset_problems", "text"), ("reported_by", "text"),
    ("reported_wall_ns", "integer"), ("counts", "truth"),
]  # fmt: skip


def _presentations(history: History) -> Iterator[Row]:
    for batch in history.batches.values():
        made = batch.made
        for position, (pres, index) in enumerate(zip(made.pres_ids, made.order, strict=True)):
            item, sha = made.items[index], made.shas[index] if index < len(made.shas) else None
            report = batch.events.get(pres)
            event = None if report is None else report.event
            onset = None if report is None else report.onset
            yield (
                pres, made.batch_id, made.stream, made.generation, made.batch_kind,
                position, item.item_id, item.kind, item.label, sha,
                *((None,) * 9 if event is None else (
                    event.outcome, event.t_on, event.t_off, event.clock, event.frame, event.missed, event.diode,
                    event.ttl, event.acquisition,
                )),
                *((None,) * 4 if onset is None else (
                    onset.t_ns, onset.by, _real(onset.uncertainty_ns), "; ".join(onset.problems) or None,
                )),
                report and report.record.client, report and report.record.wall_ns,
                batch.state.told.get(pres) is not None,
            )  # fmt: skip


_RESPONSES: list[tuple[str, Kind]] = [
    ("tell_id", "text"), ("batch_id", "text"), ("stream", "text"), ("generation", "integer"), ("batch_kind", "text"),
    ("item_id", "text"), ("pres_id", "text"), ("unit", "text"), ("response", "real"), ("response_kind", "text"),
    ("status", "text"), ("counts", "truth"), ("window_from_ms", "real"), ("window_to_ms", "real"),
    ("baseline_from_ms", "real"), ("baseline_to_ms", "real"), ("told_by", "text"), ("told_wall_ns", "integer"),
]  # fmt: skip


def _responses(history: History) -> Iterator[Row]:
    presentations = rows_that_count(history)
    for number, told in enumerate(history.tells):
        batch = history.batches.get(told.header.batch_id)
        if batch is None:
            continue
        header, values = told.header, told.responses.numpy()
        for row, item in enumerate(header.item_ids):
            counting = presentations.get((number, row), [])
            # A row for an item as a whole may stand for several presentations.
            pres = header.pres_ids[row] if header.pres_ids else counting[0] if len(counting) == 1 else None
            for unit, value in zip(header.units, values[row].tolist(), strict=True):
                yield (
                    header.id, header.batch_id, batch.made.stream, batch.made.generation, batch.made.batch_kind,
                    item, pres, unit, _real(value), header.kind,
                    header.status[row] if header.status else "ok", bool(counting),
                    *(header.window_ms or (None, None)), *(header.baseline_ms or (None, None)),
                    told.client, told.wall_ns,
                )  # fmt: skip


def rows_that_count(history: History) -> dict[tuple[int, int], list[str]]:
    """The rows of tells that count, as (number of the tell, row), with the presentations that each stands for."""
    rows: dict[tuple[int, int], list[str]] = {}
    for batch in history.batches.values():
        for pres in batch.state.item_of:
            tag = batch.state.told.get(pres)
            if tag is not None:
                rows.setdefault((int(tag[0]), int(tag[1])), []).append(pres)
    return rows


_CLOCKS: list[tuple[str, Kind]] = [
    ("clock", "text"), ("client", "text"), ("wall_ns", "integer"), ("mono_ns", "integer"), ("at_ns", "integer"),
    ("offset_ns", "integer"), ("drift_ppm", "real"), ("uncertainty_ns", "real"), ("exchanges", "integer"),
    ("shortest_ns", "integer"),
]  # fmt: skip


def _clocks(history: History) -> Iterator[Row]:
    for record in history.clocks:
        trips = [(t4 - t1) - (t3 - t2) for t1, t2, t3, t4 in record.exchanges]
        yield (
            record.clock, record.client, record.wall_ns, record.mono_ns, record.at_ns, record.offset_ns,
            _real(record.drift_ppm), _real(record.uncertainty_ns), len(trips), min(trips, default=None),
        )  # fmt: skip


_EXCHANGES: list[tuple[str, Kind]] = [
    ("clock", "text"), ("client", "text"), ("wall_ns", "integer"), ("sent_ns", "integer"), ("received_ns", "integer"),
    ("answered_ns", "integer"), ("arrived_ns", "integer"),
]  # fmt: skip


def _exchanges(history: History) -> Iterator[Row]:
    for record in history.clocks:
        for exchange in record.exchanges:
            yield (record.clock, record.client, record.wall_ns, *exchange)


_NOTES: list[tuple[str, Kind]] = [
    ("wall_ns", "integer"), ("mono_ns", "integer"), ("what", "text"), ("text", "text"), ("stream", "text"),
    ("client", "text"), ("id", "text"),
]  # fmt: skip


def _notes(history: History) -> Iterator[Row]:
    rows: list[Row] = []
    for record in (*history.opened, *history.closed):
        opened = isinstance(record, Opened)
        text = f"process {record.pid} on {record.host}" if isinstance(record, Opened) else ""
        rows.append((record.wall_ns, record.mono_ns, "opened" if opened else "closed", text, None, None, None))
    rows += [(c.wall_ns, c.mono_ns, c.what, c.text, c.stream, c.client, c.id) for c in history.controls]
    yield from sorted(rows, key=lambda row: row[0])


def _real(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

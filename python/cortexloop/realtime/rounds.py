"""What is known of batches and generations: which presentations have responses, which items lack some.

All of it follows from the records of the journal in their order, and from nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from cortexloop.realtime.messages import Event, Ignored, Tell
from cortexloop.realtime.records import BatchMade

Responses = NDArray[np.float64]


@dataclass(eq=False)
class BatchState:
    """A batch and the responses to its presentations. `closed`: nothing that comes now changes anything."""

    made: BatchMade
    number: int
    """Position in the order of batches."""
    told: dict[str, Responses | None] = field(default_factory=dict)
    """By presentation: responses [units] that count, None for one that was shown in vain."""
    units: tuple[str, ...] | None = None
    """Of the first responses that count."""
    served: bool = False
    closed: bool = False

    def close(self) -> None:
        """Nothing that comes from now on changes anything; what is not needed for saying so is let go."""
        self.closed = True
        self.made = msgspec.structs.replace(
            self.made, items=[], shas=[], order=[], pres_ids=[], codes=None, decision=None
        )
        for known in (self.told, self.item_of, self.presentations):
            known.clear()

    def has(self, pres_id: str) -> bool:
        """Whether a presentation is one of this batch, as far as is still known."""
        return pres_id in self.item_of or (self.closed and pres_id.startswith(f"{self.made.batch_id}."))

    def __post_init__(self) -> None:
        self.item_of = {
            pres: self.made.items[index].item_id
            for pres, index in zip(self.made.pres_ids, self.made.order, strict=True)
        }
        self.presentations: dict[str, list[str]] = {item.item_id: [] for item in self.made.items}
        for pres, item in self.item_of.items():
            self.presentations[item].append(pres)

    @property
    def complete(self) -> bool:
        """Whether every presentation is told of."""
        return self.closed or len(self.told) == len(self.item_of)

    def of_item(self, item_id: str) -> list[Responses]:
        """Responses that count, in the order of presentation."""
        found = (self.told.get(pres) for pres in self.presentations[item_id])
        return [values for values in found if values is not None]

    def reference_mean(self, columns: Sequence[int] | None) -> float | None:
        """Mean response to the references, over these units; None without any."""
        found = [
            float((values if columns is None else values[list(columns)]).mean())
            for item in self.made.items
            if item.kind == "ref"
            for values in self.of_item(item.item_id)
        ]
        return float(np.mean(found)) if found else None

    def take(self, tell: Tell, responses: Responses) -> tuple[int, list[Ignored]]:
        """Take the rows of a tell; how many counted, and which did not."""
        if self.closed:
            return 0, [Ignored(item_id=item, why="late") for item in tell.item_ids]
        status = tell.status or ["ok"] * len(tell.item_ids)
        accepted, ignored = 0, []
        for row, presentations in self._presentations_of_rows(tell):
            fresh = [pres for pres in presentations if pres not in self.told]
            if not fresh:
                in_vain = bool(presentations) and all(self.told[pres] is None for pres in presentations)
                ignored.append(Ignored(item_id=tell.item_ids[row], why="not_ok" if in_vain else "duplicate"))
                continue
            if self.units is None and status[row] == "ok":
                self.units = tuple(tell.units)
            for pres in fresh:
                self.told[pres] = responses[row].copy() if status[row] == "ok" else None
            accepted += 1
        if tell.final:
            for pres in self.item_of:
                self.told.setdefault(pres, None)
        return accepted, ignored

    def _presentations_of_rows(self, tell: Tell) -> Iterable[tuple[int, list[str]]]:
        """Which presentations each row is about.

        Without names of presentations, one row for an item is about all that are not told yet; several rows are about
        one after the other.
        """
        if tell.pres_ids is not None:
            yield from ((row, [pres]) for row, pres in enumerate(tell.pres_ids))
            return
        rows_of: dict[str, list[int]] = {}
        for row, item in enumerate(tell.item_ids):
            rows_of.setdefault(item, []).append(row)
        for item, rows in rows_of.items():
            every = self.presentations[item]
            waiting = [pres for pres in every if pres not in self.told]
            if len(rows) == 1:
                yield rows[0], waiting or every
                continue
            for position, row in enumerate(rows):
                yield row, waiting[position : position + 1] or every

    def note(self, events: Sequence[Event], late: Collection[str] = ()) -> tuple[int, list[Ignored]]:
        """Presentations that went wrong do not count, whatever was or will be told of them; but for the late ones."""
        accepted, ignored = 0, []
        for event in events:
            if event.outcome == "ok":
                accepted += 1
            elif self.closed or event.pres_id in late:
                ignored.append(Ignored(item_id=event.pres_id, why="late"))
            else:
                self.told[event.pres_id] = None
                accepted += 1
        return accepted, ignored


@dataclass(eq=False)
class Round:
    """One proposal of a source: its batch, and the batches in which missing images were shown again."""

    stream: str
    generation: int
    item_ids: list[str]
    repeats: int
    batches: list[BatchState]
    grants: int = 0
    """How often the experimenter allowed more presentations than `max_reshow`."""
    learned: bool = False

    def close(self) -> None:
        """It is learned."""
        self.learned = True
        for batch in self.batches:
            batch.close()
        self.batches, self.item_ids = [], []

    @property
    def told(self) -> bool:
        """Whether every presentation so far is told of."""
        return all(batch.complete for batch in self.batches)

    def of_item(self, item_id: str) -> list[Responses]:
        """Responses that count, over all batches."""
        return [v for batch in self.batches if item_id in batch.presentations for v in batch.of_item(item_id)]

    def lacking(self) -> dict[str, int]:
        """How many responses each item lacks, those that lack none left out."""
        lacks = {item: self.repeats - len(self.of_item(item)) for item in self.item_ids}
        return {item: count for item, count in lacks.items() if count > 0}

    def fraction(self) -> float:
        """Share of the items that have at least one response."""
        return sum(bool(self.of_item(item)) for item in self.item_ids) / len(self.item_ids)

    def may_show_again(self, max_reshow: int) -> bool:
        """Whether missing images are shown once more."""
        return len(self.batches) - 1 < max_reshow + self.grants * max(max_reshow, 1)

    def results(self, columns: Sequence[int] | None) -> tuple[Responses, Responses]:
        """Scores [items] and responses [items, units], means over presentations, NaN for items without any.

        Args:
            columns: the units that make the score, all if None.
        """
        responses = []
        width = 1
        for item in self.item_ids:
            values = self.of_item(item)
            chosen = [v if columns is None else v[list(columns)] for v in values]
            width = len(chosen[0]) if chosen else width
            responses.append(np.mean(chosen, axis=0) if chosen else None)
        filled = np.stack([np.full(width, np.nan) if r is None else r for r in responses])
        return filled.mean(axis=1), filled

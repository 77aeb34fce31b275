"""Online batches: the steps of a run whose mixture is decided while it trains. A step is a function of the windows so far.

plan folder (all candidates) + mixer state --order, packing--> the window that a step is in --> `batches[step]`
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from tutelage.errors import PlanError
from tutelage.plan.assemble import Placements, Steps, members_of, place_draws
from tutelage.plan.batch import Batches
from tutelage.plan.online import OnlineMixer, OnlineRule
from tutelage.plan.order import Order
from tutelage.plan.windows import WINDOW_STEPS, Cuts, StepShape, cut_windows
from tutelage.records import Batch
from tutelage.tables import PLACEMENTS, PLAN_STEPS, PLANNED, Shards, read_table, write_table


class OnlineBatches(Sequence[Batch]):
    """The steps of an online plan: `len(batches)` of them, those of the windows decided so far at hand.

    Training calls `look` with every measurement and keeps `state()` in its checkpoints; `restore` brings back the same steps.
    """

    def __init__(self, plan_folder: Path, shards: Shards) -> None:
        facts = json.loads((plan_folder / "manifest.json").read_text())["facts"]
        self._batches = Batches(plan_folder, shards)
        planned = read_table(plan_folder / "planned.parquet", PLANNED)
        self._num_tokens, self._weight = planned["num_tokens"].to_numpy(), planned["weight"].to_numpy()
        self._tasks: tuple[str, ...] = tuple(facts["tasks"])
        self._members, self._first = members_of(self._batches.documents.task, len(self._tasks))
        online = facts["online"]
        self._rule, self._seed = OnlineRule(**online["rule"]), int(online["seed"])
        self._shape, self._every = StepShape(**online["shape"]), int(online["every_steps"])
        self._num_steps = int(facts["num_steps"])
        self._mixer = OnlineMixer(self._rule)
        self._open = lru_cache(maxsize=2)(self._make)

    def __len__(self) -> int:
        return self._num_steps

    @overload
    def __getitem__(self, step: int) -> Batch: ...

    @overload
    def __getitem__(self, step: slice) -> list[Batch]: ...

    def __getitem__(self, step: int | slice) -> Batch | list[Batch]:
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(len(self)))]
        step = range(len(self))[step]
        window, local = divmod(step, self._every)
        if window >= len(self._mixer.windows):
            raise PlanError(f"step {step} is in window {window} of an online mixture, which is not decided yet")
        placements, steps = self._open(window)
        return dataclasses.replace(self._batches.placed(placements, steps)[local], step=step)

    def is_due(self, step: int) -> bool:
        """Whether the losses after so many steps decide the window that begins there."""
        return step == len(self._mixer.windows) * self._every and not self._mixer.is_complete

    def look(self, step: int, losses: Mapping[str, float]) -> dict[str, Any] | None:
        """What was decided by these held-out losses by task, None where nothing was due; before step 0 they are the reference."""
        if step == 0:
            self._mixer.start(losses)
        if not self.is_due(step):
            return None
        self._mixer.next_window(losses)
        return self.history()[-1]

    def history(self) -> list[dict[str, Any]]:
        """One line per window decided: its first step, the shares it is drawn by, its examples by task, and why."""
        windows = enumerate(self._mixer.windows)
        return [{"window": i, "first_step": i * self._every, **dataclasses.asdict(window)} for i, window in windows]

    def state(self) -> dict[str, Any]:
        """What the rest of the run depends on, as JSON."""
        return self._mixer.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing; the run is where `state` was taken."""
        self._mixer = OnlineMixer.from_state(self._rule, state)
        self._open.cache_clear()

    def write(self, folder: Path, steps_done: int) -> None:
        """Nothing; placements.parquet and plan_steps.parquet are the plan as it became, up to the steps that were taken."""
        placements, steps = _join([self._open.__wrapped__(i) for i in range(len(self._mixer.windows))])
        num = min(steps_done, len(steps))
        end = steps.first_row[num - 1] + steps.num_rows[num - 1] if num else 0
        met = {name: values[placements.row < end] for name, values in vars(placements).items()}
        write_table(folder / "placements.parquet", pa.table(met, schema=PLACEMENTS))
        taken = {"step": np.arange(num), **{name: values[:num] for name, values in vars(steps).items()}}
        write_table(folder / "plan_steps.parquet", pa.table(taken, schema=PLAN_STEPS))

    def _make(self, number: int) -> tuple[Placements, Steps]:
        """The rows and steps of one window, from 0."""
        before, counts = self._mixer.drawn_before(number), self._mixer.windows[number].counts
        sizes = dict(
            zip(self._tasks, np.bincount(self._batches.documents.task, minlength=len(self._tasks)).tolist(), strict=True)
        )
        order = Order(
            {name: before[name] + counts[name] for name in counts}, sizes=sizes, seed=self._seed, stretches=[before, counts]
        )
        start = sum(before.values())
        draws = order.window(start, len(order))
        first = self._first[[self._tasks.index(name) for name in order.tasks]]
        example = self._members[first[draws.task] + draws.index]
        lengths = self._num_tokens[example]
        layout = cut_windows(lengths, shape=self._shape, seed=self._seed + number, cuts=Cuts(WINDOW_STEPS))
        return place_draws(layout, example, draws.visit, lengths=lengths, weight=self._weight)


def _join(windows: Sequence[tuple[Placements, Steps]]) -> tuple[Placements, Steps]:
    """Windows one after the other, their rows numbered on."""
    placed, stepped = list(_numbered_on(windows)), [steps for _, steps in windows]
    first_row = np.cumsum([0, *(int(steps.num_rows.sum()) for steps in stepped)])
    placements = Placements(*(np.concatenate(columns) for columns in zip(*(vars(p).values() for p in placed), strict=True)))
    joined = Steps(*(np.concatenate(columns) for columns in zip(*(vars(s).values() for s in stepped), strict=True)))
    number = np.repeat(np.arange(len(stepped)), [len(steps) for steps in stepped])
    return placements, dataclasses.replace(joined, first_row=joined.first_row + first_row[number], window=number)


def _numbered_on(windows: Sequence[tuple[Placements, Steps]]) -> Iterator[Placements]:
    first = 0
    for placements, steps in windows:
        yield dataclasses.replace(placements, row=placements.row + first)
        first += int(steps.num_rows.sum())

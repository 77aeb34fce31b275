"""Wrong programs, each a mistake that somebody has shipped, and the tests that must reject it.

A suite that cannot fail proves nothing. Every entry names a function (`module:function` or `module:Class.method`), a
replacement (called with the right one, returns the wrong one) and the tests of which at least one must fail with it in
place. `test_mutants.py` runs them; add an entry by appending to `MUTANTS`.

    python tests/mutants.py [NAME ...]       runs them from a shell and prints what each left failing, as JSON
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pytest

HERE = Path(__file__).parent
Function = Callable[..., Any]


@dataclass(frozen=True)
class Mutant:
    """`replacement(right)` is planted at `target`; at least one of `tests` (pytest node ids below tests/) must fail."""

    name: str
    target: str
    replacement: Callable[[Function], Function]
    tests: tuple[str, ...]


def plant(mutant: Mutant) -> None:
    """Puts the wrong function wherever the right one is known: in its module, and under every name that imported it."""
    module_name, _, path = mutant.target.partition(":")
    *owners, last = path.split(".")
    home: Any = importlib.import_module(module_name)
    for owner in owners:
        home = getattr(home, owner)
    right = getattr(home, last)
    wrong = mutant.replacement(right)
    setattr(home, last, wrong)
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is right and module.__name__ != __name__:
                setattr(module, name, wrong)


def by_name(name: str) -> Mutant:
    """The mutant of that name."""
    return next(mutant for mutant in MUTANTS if mutant.name == name)


# --- plan: rates


def remainder_to_the_largest(_: Function) -> Function:
    def settle(due: dict[str, int], total: int, *, one: int) -> dict[str, int]:
        counts = {name: amount // one for name, amount in due.items()}
        counts[max(due, key=lambda name: due[name])] += total - sum(counts.values())
        return counts

    return settle


def int_truncation(_: Function) -> Function:
    return lambda due, total, *, one: {name: amount // one for name, amount in due.items()}


def cap_ignored_on_refill(_: Function) -> Function:
    return lambda self, level: max(self.low, level * self.weight)


def refill_once(_: Function) -> Function:
    """Pours the freed budget out a single time, so that tasks which the refill pushes over their cap stay over or short."""

    def level(self: Any, amount: Fraction) -> Fraction:
        first = Fraction(amount) / sum(part.weight for part in self.parts)
        over = [part for part in self.parts if part.high is not None and first * part.weight > part.high]
        rest = [part for part in self.parts if part not in over]
        if not over or not rest:
            return first
        return Fraction(amount - sum(part.high for part in over)) / sum(part.weight for part in rest)

    return level


def cap_per_pass(right: Function) -> Function:
    """Every epoch starts to count visits anew."""

    def bounds(tree: Any, drawn: Any, mix: Any) -> Any:
        found = right(tree, drawn, mix)
        passes = math.ceil(mix.epochs or 1)
        return dataclasses.replace(found, most={name: passes * cap for name, cap in found.most.items()})

    return bounds


def freed_to_everybody(right: Function) -> Function:
    """Groups forgotten once their weights are multiplied out: what a member frees goes to outsiders too."""

    def vessel(share: Any, *, least: Any, most: Any) -> Any:
        from tutelage.plan.pour import pour

        if not any(part.parts for part in share.parts):
            return right(share, least=least, most=most)
        weights = pour(right(share, least={}, most={}), Fraction(1))
        flat = [dataclasses.replace(leaf, weight=Fraction(weights[leaf.name])) for leaf in share.leaves()]
        return right(dataclasses.replace(share, parts=tuple(flat)), least=least, most=most)

    return vessel


def remainders_over_all_groups(right: Function) -> Function:
    """A group of many small shares collects the remainders of the others."""

    def settle(vessel: Any, quotas: Any) -> Any:
        return right(dataclasses.replace(vessel, parts=tuple(vessel.leaves())) if vessel.parts else vessel, quotas)

    return settle


def cap_after_temperature(right: Function) -> Function:
    """K against e^(1/T), where it never binds."""

    def weights(sizes: Any, rates: Any) -> Any:
        from tutelage.plan.spec import Capped, Temperature

        if not isinstance(rates, Capped):
            return right(sizes, rates)
        whole = max(sizes.values())
        tempered = right(sizes, Temperature(temperature=rates.temperature))
        scale = Fraction(whole ** (1 / rates.temperature)) / max(tempered.values())
        return {name: min(weight * scale, Fraction(rates.cap)) for name, weight in tempered.items()}

    return weights


def steps_by_token_count(_: Function) -> Function:
    """The first estimate taken for the answer."""
    return lambda num_steps, filled, *, guess, least=1, most=None: guess


# --- plan: order


def sampling_with_replacement(_: Function) -> Function:
    from tutelage.plan.order import _mix

    return lambda index, *, size, keys: (_mix(index.astype(np.uint64) ^ keys) % np.uint64(size)).astype(np.int64)


def first_n_sampling(_: Function) -> Function:
    return lambda index, *, size, keys: index


def same_shuffle_every_pass(right: Function) -> Function:
    return lambda seed, name, passes: right(seed, name, np.zeros_like(passes))


def one_generator_for_all_tasks(right: Function) -> Function:
    """A task's shuffle depends on how much was drawn before it."""
    drawn = itertools.count()
    return lambda seed, name, passes: right(seed, str(next(drawn)), passes)


def task_after_task(_: Function) -> Function:
    from tutelage.plan.order import Node, Tree

    def sizes(tree: Tree, num: int) -> list[tuple[int, int]]:
        if isinstance(tree, Node):
            return [*sizes(tree.left, tree.num_left), *sizes(tree.right, tree.num - tree.num_left)]
        return [(tree, num)]

    def blocks(tree: Tree, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        leaves = sizes(tree, tree.num if isinstance(tree, Node) else int(positions.max(initial=0)) + 1)
        begins = np.cumsum([0, *(count for _, count in leaves)])
        which = np.searchsorted(begins, positions, "right") - 1
        return np.array([leaf for leaf, _ in leaves], np.int32)[which], positions - begins[which]

    return blocks


def resume_that_restarts(right: Function) -> Function:
    return lambda self, start, stop: right(self, 0, stop - start)


# --- plan: weights and batches


def polarity_flipped(right: Function) -> Function:
    return lambda loss: 1 - right(loss)


def stop_token_cut(right: Function) -> Function:
    from tutelage.records import Kind

    def table(loss: Any) -> np.ndarray:
        weights: np.ndarray = right(loss)
        weights[Kind.STOP] = 0.0
        return weights

    return table


def template_tokens_trained(right: Function) -> Function:
    """Instruction Modelling as "everything but padding"."""
    from tutelage.plan.spec import FullLoss, InstructionModelling

    return lambda loss: right(FullLoss() if isinstance(loss, InstructionModelling) else loss)


def turn_weights_ignored(right: Function) -> Function:
    return lambda kinds, **others: right(kinds, **{**others, "turn_weights": None})


def marks_left_to_the_scaffold(right: Function) -> Function:
    from tutelage.records import Kind

    def weigh(kinds: np.ndarray, *, turns: np.ndarray | None = None, **others: Any) -> np.ndarray:
        nobody = None if turns is None else np.where(kinds == Kind.SCAFFOLD, -1, turns)
        weights: np.ndarray = right(kinds, turns=nobody, **others)
        return weights

    return weigh


def last_turn_only_silences_prompts(_: Function) -> Function:
    return lambda kinds, turns: np.ones(len(kinds), bool)


def turns_ignored(_: Function) -> Function:
    from tutelage.plan.spec import LastResponse

    return lambda loss: isinstance(loss, LastResponse)


def shift_after_packing(right: Function) -> Function:
    return lambda ids, weights, *, offsets=None: right(ids, weights)


def weights_not_shifted(right: Function) -> Function:
    return lambda ids, weights, *, offsets=None: (*right(ids, weights, offsets=offsets)[:2], weights)


def positions_not_restarting(right: Function) -> Function:
    def assemble(self: Any, placed: Any, step: int) -> Any:
        batch = right(self, placed, step)
        columns = np.broadcast_to(np.arange(batch.inputs.shape[1], dtype=np.int32), batch.inputs.shape)
        return dataclasses.replace(batch, positions=columns * (batch.segments > 0))

    return assemble


def all_ones_over_a_pack(right: Function) -> Function:
    def assemble(self: Any, placed: Any, step: int) -> Any:
        batch = right(self, placed, step)
        return dataclasses.replace(batch, segments=np.minimum(batch.segments, 1))

    return assemble


def normalised_after_source_weights(right: Function) -> Function:
    """Every source ends up with the weight it would have had without one."""

    def settle(self: Any, num_visits: np.ndarray, task: np.ndarray) -> Any:
        own, factors = self.totals, self.multiplier
        return right(dataclasses.replace(self, totals=lambda m: own(m * factors if (m == 1).all() else m)), num_visits, task)

    return settle


def _levelled(weights: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Weights rewritten so that each group of slots weighs the same, and the whole what it did."""
    sums = np.bincount(groups.ravel(), weights=weights.ravel())
    target = sums.sum() / max(int((sums > 0).sum()), 1)
    return weights * np.where(sums > 0, target / np.where(sums > 0, sums, 1), 0)[groups]


def examples_normalised_per_row(right: Function) -> Function:
    """A packed row taken for an example."""

    def assemble(self: Any, placed: Any, step: int) -> Any:
        batch = right(self, placed, step)
        if self._loss.normalise != "example":
            return batch
        rows = np.broadcast_to(np.arange(len(batch.weights))[:, None], batch.weights.shape)
        return dataclasses.replace(batch, weights=_levelled(batch.weights.astype(np.float64), rows))

    return assemble


def tasks_normalised_per_step(right: Function) -> Function:
    """A task that is rare in a step gets a huge weight there."""

    def assemble(self: Any, placed: Any, step: int) -> Any:
        batch = right(self, placed, step)
        if self._loss.normalise != "task":
            return batch
        examples = np.zeros(batch.weights.shape, np.int64)
        for document in batch.documents:
            examples[document.row, document.start : document.start + document.length] = 1 + (document.example > 0)
        return dataclasses.replace(batch, weights=_levelled(batch.weights.astype(np.float64), examples))

    return assemble


def first_tokens_tallied(right: Function) -> Function:
    def runs(kinds: np.ndarray, turns: np.ndarray, offsets: np.ndarray) -> Any:
        found = right(kinds, turns, offsets)
        return dataclasses.replace(found, is_target=np.ones_like(found.is_target))

    return runs


def record_weights_by_place(right: Function) -> Function:
    """Record weights given to examples in their order, as if every record had one example."""

    def examples(name: str, shard: int, artefacts: Any, *, multiplier: np.ndarray, loss: Any) -> Any:
        found = right(name, shard, artefacts, multiplier=multiplier, loss=loss)
        return dataclasses.replace(found, multiplier=multiplier[: len(found.row)])

    return examples


def targets_counted_once(right: Function) -> Function:
    """Targets of a record counted once, however often it is visited."""

    def sums(tally: Any, *, num_visits: np.ndarray, **more: Any) -> Any:
        return right(tally, num_visits=np.minimum(num_visits, 1), **more)

    return sums


def fates_in_order_of_name(right: Function) -> Function:
    """Each record of a table gets a reason of the table, but not its own."""

    def put_each(self: Any, records: np.ndarray, names: Any) -> None:
        right(self, records, names)
        if len(records):
            self._codes[records] = np.sort(self._codes[records])

    return put_each


def rows_in_packing_order(right: Function) -> Function:
    """Documents sorted by row alone: in a row they stand as they were drawn."""

    def sort(row: np.ndarray, start: np.ndarray, *, num_rows: int) -> np.ndarray:
        return np.argsort(row, kind="stable").astype(np.int32)

    return sort


# --- plan: packing, windows, joining


def next_fit_packing(_: Function) -> Function:
    from tutelage.plan.fit import Packing

    def pack(lengths: Sequence[int], *, capacity: int, max_documents: int | None = None) -> Packing:
        rows, starts, row, used = [], [], 0, 0
        for length in lengths:
            if used + length > capacity:
                row, used = row + 1, 0
            rows.append(row)
            starts.append(used)
            used += length
        unknown = np.zeros(row + (used > 0), np.int32)
        return Packing(unknown, unknown, np.array(rows, np.int32), np.array(starts, np.int32))

    return pack


def documents_split_at_borders(_: Function) -> Function:
    """One stream of tokens cut every `capacity`, as pre-training does."""
    from tutelage.plan.fit import Packing

    def pack(begun: Any, lengths: Sequence[int], *, capacity: int, max_documents: int | None = None) -> Packing:
        ends = np.cumsum(np.asarray(lengths, np.int64)) + begun.num_rows * capacity
        first = ends - lengths
        num_rows = -(-int(ends.max(initial=0)) // capacity)
        unknown = np.zeros(num_rows, np.int32)
        return Packing(unknown, unknown, (first // capacity).astype(np.int32), (first % capacity).astype(np.int32))

    return pack


def document_limit_ignored(right: Function) -> Function:
    return lambda begun, lengths, *, capacity, max_documents=None: right(begun, lengths, capacity=capacity)


def waiting_rows_left_half_empty(right: Function) -> Function:
    def pack(begun: Any, lengths: Sequence[int], **others: Any) -> Any:
        packing = right(dataclasses.replace(begun, free=np.zeros_like(begun.free)), lengths, **others)
        packing.free[: begun.num_rows] = begun.free
        return packing

    return pack


def waiting_documents_forgotten(right: Function) -> Function:
    return lambda whole, row_waits, item_waits: right(whole, np.zeros_like(row_waits), np.zeros_like(item_waits))


def one_window_for_the_whole_run(right: Function) -> Function:
    """Packs everything at once and shuffles the rows, which fills them best."""

    def cut(lengths: np.ndarray, *, shape: Any, seed: int = 0) -> Any:
        import tutelage.plan.windows as windows

        short, windows.WINDOW_STEPS = windows.WINDOW_STEPS, len(lengths) + 1
        try:
            layout = right(lengths, shape=shape, seed=seed)
        finally:
            windows.WINDOW_STEPS = short
        return dataclasses.replace(layout, window=np.arange(len(layout.slots)) // short)

    return cut


def emptiest_rows_wait_for_ever(right: Function) -> Function:
    return lambda free, *, most, num_waiting: right(free, most=most, num_waiting=0)


def rows_not_shuffled(_: Function) -> Function:
    return lambda num, *, seed, window: np.arange(num)


def rows_dealt_in_order(_: Function) -> Function:
    return lambda cost, *, num, size: np.append(np.arange(len(cost)), [-1] * (num * size - len(cost))).reshape(num, size)


def rows_balanced_by_tokens(_: Function) -> Function:
    return lambda lengths, *, hidden_size=1: np.asarray(lengths, np.int64)


def verdict_polarity_flipped(_: Function) -> Function:
    import pyarrow as pa
    import pyarrow.compute as pc

    from tutelage.tables import VERDICTS, read_table

    def drops(artefact: Any, name: str) -> Any:
        table = read_table(artefact.file("verdicts.parquet"), VERDICTS)
        return table.filter(pc.and_(pc.equal(table["source"].cast(pa.string()), name), table["keep"]))

    return drops


# --- train


def mean_of_pass_means(right: Function) -> Function:
    def gradients(parallel: Any, flat: Any, part: Any, *, aim: Any, device: Any) -> Any:
        own = float(flat.weights[part.start : part.stop].sum())
        share = (part.stop - part.start) / len(flat.inputs)
        return right(parallel, flat, part, aim=dataclasses.replace(aim, total_weight=own / share or 1.0), device=device)

    return gradients


def weights_as_a_mask(right: Function) -> Function:
    def flat(batch: Any) -> Any:
        made = right(batch)
        return dataclasses.replace(made, weights=(made.weights > 0).astype(np.float32))

    return flat


def head_counted_for_every_token(right: Function) -> Function:
    return lambda work, lengths, *, num_targets: right(work, lengths, num_targets=sum(lengths))


def frozen_layers_counted_as_trained(right: Function) -> Function:
    return lambda module: True


def checkpoints_never_found(_: Function) -> Function:
    return lambda self: None


def resume_without_random_state(_: Function) -> Function:
    return lambda states, device: None


def resume_without_moments(right: Function) -> Function:
    return lambda self, weights, memory=None: right(self, weights)


def resume_that_skips_a_batch(right: Function) -> Function:
    def go_on(self: Any) -> None:
        right(self)
        if 0 < self.position.step < self.num_steps - 1:
            self.position = dataclasses.replace(self.position, step=self.position.step + 1)

    return go_on


def deadline_without_the_checkpoint(_: Function) -> Function:
    return lambda self: 0.0


def passes_begun_anew_by_an_extension(_: Function) -> Function:
    return lambda self, occurrence: occurrence


def extension_with_a_fresh_optimizer(right: Function) -> Function:
    return lambda beginning, *rest: right(dataclasses.replace(beginning, optimizer="fresh"), *rest)


def copies_of_held_out_answers(right: Function) -> Function:
    def trained(artefacts: Any, held_out: Any, shards: Any, *, spec: Any, run: str) -> dict[str, Any]:
        from tutelage.evaluate.overfit import Planned
        from tutelage.tables import HELD_OUT, read_table

        table = read_table(artefacts["held_out"].file("held_out.parquet"), HELD_OUT)
        return right(artefacts, held_out, shards, spec=spec, run=run) | {"planned": Planned(table, shards)}

    return trained


def gap_of_two_mixtures(right: Function) -> Function:
    def total(lines: Any, values: Any) -> Any:
        return dataclasses.replace(right(lines, values), train=values["train_nll", ""].value)

    return total


def damage_overlooked(_: Function) -> Function:
    return lambda folder: None


def sums_in_bfloat16(_: Function) -> Function:
    def widen(master: Any) -> Function:
        def move(parameter: Any) -> None:
            total = parameter.grad if master.grad is None else master.grad.bfloat16() + parameter.grad
            master.grad, parameter.grad = total.float(), None

        return move

    return widen


def warmup_counted_into_the_fall(_: Function) -> Function:
    return lambda step, num_warmup, num_steps: step / max(1, num_steps - 1)


# --- model: objectives


def noise_scaled_by_the_row(right: Function) -> Function:
    return lambda lengths, size, alpha: right([sum(lengths)], size, alpha)


def dft_without_stop_gradient(right: Function) -> Function:
    """d(-p log p) = p (1 + log p) (p - onehot): another objective, under which what is far off pulls the other way."""

    def slopes(weights: Any, nll: Any, options: Any) -> Any:
        made = right(weights, nll, options)
        return made * (1 - nll) if options.objective == "dft" else made

    return slopes


def kl_the_other_way_round(right: Function) -> Function:
    other = {"forward": "reverse", "reverse": "forward"}
    return lambda log_p, anchor, rows: right(log_p, dataclasses.replace(anchor, direction=other[anchor.direction]), rows)


def start_with_dropout(_: Function) -> Function:
    """The adapter is off, but the model stays in training mode."""
    return lambda model: model.disable_adapter()


def start_that_moves_along(_: Function) -> Function:
    return lambda model: model


def pull_by_loss_weight_alone(right: Function) -> Function:
    """Places that only the pull chose are left out."""
    return lambda targets, weights, *, num_words, pulls=None: right(targets, weights, num_words=num_words)


def noise_from_the_step_alone(right: Function) -> Function:
    return lambda seed, step, example, visit: right(seed, step, 0, 0)


# --- audit


def turns_counted_within_examples(right: Function) -> Function:
    """The turn numbers of one example taken for those of the whole set."""

    def of(stretch: Any, weights: np.ndarray) -> Any:
        return dataclasses.replace(right(stretch, weights), turn=np.maximum(stretch.turns, 0).astype(np.int64))

    return of


def cut_answers_overlooked(_: Function) -> Function:
    return lambda stretch, flat, learned: np.zeros(0, np.int64)


def stops_judged_by_their_first_token(_: Function) -> Function:
    def first_stops(flat: Any, stops: np.ndarray) -> np.ndarray:
        return np.flatnonzero(stops & ~np.concatenate([[False], stops[:-1]]))

    return first_stops


def ascii_trimmed_only(right: Function) -> Function:
    def trimmed(self: Any, first: Any, last: Any, edit: Any) -> Any:
        return right(self, first, last, edit._replace(characters=edit.characters or " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f"))

    return trimmed


def token_to_where_it_begins(right: Function) -> Function:
    def label(starts: Any, ends: Any, *rest: Any) -> Any:
        return right(starts, starts, *rest)

    return label


def blank_texts_filled_in(right: Function) -> Function:
    def fill(self: Any, records: Any, filler: Any, pattern: Any) -> Any:
        self._is_blank = np.zeros_like(self._is_blank)
        return right(self, records, filler, pattern)

    return fill


def every_rendered_example_audited(right: Function) -> Function:
    from tutelage.tables import RenderedSet

    return lambda folder, chosen, **more: right(folder, np.arange(len(RenderedSet(folder))), **more)


def copies_by_half_a_key(right: Function) -> Function:
    return lambda keys: right(keys * np.array([1, 0], np.uint64))


def threshold_over_all_sources(right: Function) -> Function:
    """One source full of faults hides among many clean ones."""

    def judge(part: Any, facts: Any, spec: Any, meaning: Any) -> Any:
        parts = [p for by_source in facts["findings"].values() for p in by_source.values()]
        return right(part | {"num": sum(p["num"] for p in parts), "of": sum(p["of"] for p in parts)}, facts, spec, meaning)

    return judge


def zero_weights_overlooked(_: Function) -> Function:
    """Looks at planned examples alone, none of which has weight 0."""
    return lambda self, name: None


# --- plan: export


def labels_as_targets(_: Function) -> Function:
    """Models that shift by themselves then learn the token after the next."""
    return lambda targets, weights: np.where(weights > 0, targets, -100).astype(np.int32)


def weights_rounded_to_labels(_: Function) -> Function:
    def check(self: Any, batch: Any) -> None:
        self.factor = 1.0

    return check


def steps_cut_elsewhere(_: Function) -> Function:
    def check(self: Any, batch: Any, num_rows: int) -> None:
        self.per_step, self.last = max(self.per_step, num_rows), num_rows

    return check


def existing_folder_wiped(_: Function) -> Function:
    return lambda folder, *, overwrite: None


# --- plan: schedules


def schedule_read_at_the_start_of_a_stretch(_: Function) -> Function:
    return lambda shape, number: Fraction(number, 100)


def caps_per_stage(_: Function) -> Function:
    """Every stage may use a task up to its cap once more."""
    return lambda wanted, *, costs, caps, floors=None: np.minimum(wanted, caps[:, None])


def passes_restarted_at_a_stage(right: Function) -> Function:
    def interleave(self: Any, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        task, occurrence = right(self, start, stop)
        stretch = np.searchsorted(self._starts, np.arange(start, stop), "right") - 1
        return task, occurrence - self._before[stretch, task]

    return interleave


def largest_remainder_at_each_border(_: Function) -> Function:
    def rounded(curve: np.ndarray) -> np.ndarray:
        out = np.floor(curve).astype(np.int64)
        for border in range(curve.shape[1]):
            missing = round(curve[:, border].sum()) - out[:, border].sum()
            out[np.argsort(out[:, border] - curve[:, border], kind="stable")[:missing], border] += 1
        return out

    return rounded


def stages_shuffled_into_one_another(_: Function) -> Function:
    return lambda mixture, lengths, shape: None


def online_shares_against_the_losses(right: Function) -> Function:
    return lambda self, excess: right(self, {name: -value for name, value in excess.items()})


def online_mixture_forgotten_on_resume(_: Function) -> Function:
    return lambda self, state: None


def trainer_divides_by_passes(right: Function) -> Function:
    """What transformers' Trainer does of itself: the mean over micro-batches of what already was divided by the whole."""

    def wrong(run: Any, batch: Any) -> Any:
        from tutelage.train.micro import rows_in_pass

        found = right(run, batch)
        for weight in run.optimizer.weights.values():
            weight.grad /= -(-batch.num_rows // rows_in_pass(batch.inputs.shape[1], run.task.spec.micro_batch_rows))
        return found

    return wrong


def padded_on_the_left(right: Function) -> Function:
    """Rows as generation wants them, with nothing that hides the padding."""

    def wrong(ids: Any, lengths: Any) -> Any:
        padded, is_real = right(ids, lengths)
        for row, length in enumerate(lengths):
            padded[row], is_real[row] = padded[row].roll(-int(length)), is_real[row].roll(-int(length))
        return padded, is_real

    return wrong


def stops_of_the_base_alone(right: Function) -> Function:
    """An adapter's end tokens are those of the model below it."""

    def wrong(folder: Any) -> Any:
        from tutelage.model.names import base_folder

        return right(base_folder(folder) if (Path(folder) / "adapter_config.json").is_file() else folder)

    return wrong


_TRAIN, _GRADIENT = "train/test_loop.py", "train/test_gradient.py"
_AUDIT_TOKENS, _AUDIT = "audit/test_audit_tokens.py", "audit/test_audit_stage.py"
_RATES, _ORDER, _WEIGHTS = "plan/test_rates.py", "plan/test_order.py", "plan/test_weights.py"
_NORMALISE = "plan/test_normalise.py"
_POUR = "plan/test_pour.py"
_WINDOWS, _BATCHES = "plan/test_windows.py", "plan/test_batches.py"
_SCHEDULE, _TIMETABLE = "plan/test_mix_schedule.py", "plan/test_timetable.py"
_ONLINE, _ONLINE_RUN = "plan/test_online.py", "train/test_online_mixing.py"
_EXPORT = "plan/test_export.py"


def first_of_the_file_for_a_sample(right: Function) -> Function:
    def replacement(lengths: Any, *, num: int, **more: Any) -> Any:
        chosen = right(lengths, num=num, **more)
        return dataclasses.replace(chosen, index=np.arange(len(chosen))) if len(chosen) < len(lengths) else chosen

    return replacement


def sample_said_to_be_plain(right: Function) -> Function:
    """Leaves out that a block drawn in good part has little left to vary."""

    def replacement(chosen: Any, measures: Any) -> Any:
        found = right(chosen, measures)
        factor = chosen.size.mean() / max(chosen.size.mean() - 2, 0.5)
        return dataclasses.replace(found, covariance=found.covariance * factor)

    return replacement


def visits_needed_as_planned(_: Function) -> Function:
    return lambda strata: {line["name"]: line["visits_per_record"] for line in strata}


def one_promise_for_all_units(right: Function) -> Function:
    def replacement(facts: Any) -> Any:
        shares = {line["task"]: line["promised_share"] for line in facts["mixture"]}
        return [{**line, "promised": shares[line["task"]]} for line in right(facts)]

    return replacement


def dropped_records_previewed(_: Function) -> Function:
    return lambda source, done, *, num_records: np.ones(num_records, bool)


# --- train: schedules, groups, rows of a pass; model: new tokens, patterns, merging


def decay_one_step_late(right: Function) -> Function:
    return lambda schedule, num_steps: right(schedule, num_steps) - 1


def rate_of_groups_ignored(_: Function) -> Function:
    def set_rate(self: Any, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    return set_rate


def numbers_of_the_optimizer_forgotten(right: Function) -> Function:
    def entry(what: str, owner: str, value: Any, optimizer: Any) -> Any:
        import torch

        return right(what, owner, value, optimizer) if isinstance(value, torch.Tensor) else {}

    return entry


def new_rows_at(value: float) -> Callable[[Function], Function]:
    def replacement(right: Function) -> Function:
        def make_room(model: Any, ids: Sequence[int], *, num_old: int) -> None:
            import torch

            right(model, ids, num_old=num_old)
            with torch.no_grad():
                for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                    layer.weight[list(ids)] = value * torch.randn_like(layer.weight[list(ids)])

        return make_room

    return replacement


def merged_without_its_scale(right: Function) -> Function:
    def merge_and_save(model: Any, folder: Any, **more: Any) -> Any:
        layers = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]
        kept = [dict(layer.scaling) for layer in layers]
        for layer in layers:
            layer.scaling = dict.fromkeys(layer.scaling, 1.0)
        try:
            return right(model, folder, **more)
        finally:
            for layer, scaling in zip(layers, kept, strict=True):
                layer.scaling = scaling

    return merge_and_save


def patterns_as_prefixes(_: Function) -> Function:
    return lambda pattern, name: f".{pattern.rstrip('*')}" in f".{name}"


def passes_rounded_down(right: Function) -> Function:
    def solve(num_rows: int, *, rows_per_pass: int, num_devices: int = 1, exact: bool = False) -> Any:
        found = right(num_rows, rows_per_pass=rows_per_pass, num_devices=num_devices, exact=exact)
        return dataclasses.replace(found, num_passes=max(1, num_rows // (rows_per_pass * num_devices)))

    return solve


def masters_rounded_to_the_nearest(_: Function) -> Function:
    def round_into(narrow: Any, wide: Any, **_: Any) -> None:
        narrow.detach().copy_(wide)

    return round_into


def draws_by_place_in_the_piece(right: Function) -> Function:
    return lambda narrow, wide, *, name, start=None: right(narrow, wide, name=name, start=0)


def passes_without_a_fixed_part(_: Function) -> Function:
    return lambda rise_of, limit: lambda n: n * rise_of(1) <= limit


def weight_of_a_rank_alone(right: Function) -> Function:
    """Each rank divides by the weight of its own rows, and the means are averaged."""

    def wrong(flat: Any, *, num_ranks: int, **more: Any) -> Any:
        share = right(flat, num_ranks=num_ranks, **more)
        factor = flat.weights.sum() / (num_ranks * max(share.flat.weights.sum(), 1e-9))
        weights = (share.flat.weights * factor).astype(np.float32)
        return dataclasses.replace(share, flat=dataclasses.replace(share.flat, weights=weights))

    return wrong


def ranks_left_alone(right: Function) -> Function:
    """Wide sums of narrow gradients stay with the rank that made them."""
    return lambda weights, world: None


MUTANTS: list[Mutant] = [
    Mutant(
        "W of a rank's own rows",
        "tutelage.train.shares:share_of",
        weight_of_a_rank_alone,
        ("train/test_many_ranks.py::test_two_ranks_make_the_gradient_of_one",),
    ),
    Mutant(
        "float32 masters that ranks keep to themselves",
        "tutelage.train.parallel:_average",
        ranks_left_alone,
        ("train/test_many_ranks.py::test_two_ranks_make_the_gradient_of_one",),
    ),
    Mutant(
        "remainder to the largest",
        "tutelage.plan.pour:round_to_total",
        remainder_to_the_largest,
        (f"{_RATES}::test_counts_are_the_largest_remainder_method",),
    ),
    Mutant(
        "int(total * w) truncation",
        "tutelage.plan.pour:round_to_total",
        int_truncation,
        (f"{_RATES}::test_counts_sum_to_the_total_exactly",),
    ),
    Mutant(
        "cap ignored on refill",
        "tutelage.plan.pour:Vessel.take",
        cap_ignored_on_refill,
        (f"{_RATES}::test_no_count_is_above_its_cap",),
    ),
    Mutant(
        "refill poured once",
        "tutelage.plan.pour:Vessel.level",
        refill_once,
        (f"{_RATES}::test_the_books_example_stops_at_11500_and_reaches_15000_with_refill",),
    ),
    Mutant(
        "cap per pass",
        "tutelage.plan.budget:bounds_of",
        cap_per_pass,
        (f"{_RATES}::test_a_budget_that_the_caps_cannot_reach_names_the_largest_that_they_can",),
    ),
    Mutant(
        "a group's freed budget to everybody",
        "tutelage.plan.rates:_vessel",
        freed_to_everybody,
        (f"{_POUR}::test_what_a_cap_frees_goes_to_its_own_group_first",),
    ),
    Mutant(
        "remainders over all groups",
        "tutelage.plan.pour:settle",
        remainders_over_all_groups,
        (f"{_POUR}::test_remainders_are_settled_group_by_group",),
    ),
    Mutant(
        "K after the temperature",
        "tutelage.plan.rules:_weights",
        cap_after_temperature,
        ("plan/test_rate_kinds.py::test_the_cap_k_comes_before_the_temperature",),
    ),
    Mutant(
        "steps by token count",
        "tutelage.plan.steps:examples_filling",
        steps_by_token_count,
        ("plan/test_steps.py::test_packed_steps_are_just_so_many_and_full",),
    ),
    Mutant(
        "sampling with replacement",
        "tutelage.plan.order:permute",
        sampling_with_replacement,
        (f"{_ORDER}::test_every_pass_is_a_permutation",),
    ),
    Mutant(
        "first-N sampling",
        "tutelage.plan.order:permute",
        first_n_sampling,
        (f"{_ORDER}::test_a_part_of_a_pass_is_a_fair_sample_and_not_the_first_records",),
    ),
    Mutant(
        "the same shuffle in every pass",
        "tutelage.plan.order:pass_keys",
        same_shuffle_every_pass,
        (f"{_ORDER}::test_passes_differ",),
    ),
    Mutant(
        "one generator for all tasks",
        "tutelage.plan.order:pass_keys",
        one_generator_for_all_tasks,
        (f"{_ORDER}::test_a_tasks_own_order_does_not_depend_on_the_other_tasks",),
    ),
    Mutant(
        "one task after the other",
        "tutelage.plan.order:interleave",
        task_after_task,
        (f"{_ORDER}::test_every_prefix_keeps_every_task_within_two_of_its_rate",),
    ),
    Mutant(
        "resume that restarts",
        "tutelage.plan.order:Order.window",
        resume_that_restarts,
        (f"{_ORDER}::test_any_window_equals_that_stretch_of_the_whole",),
    ),
    Mutant(
        "schedule read at the start of a stretch",
        "tutelage.plan.schedule:_mean_progress",
        schedule_read_at_the_start_of_a_stretch,
        (f"{_SCHEDULE}::test_interpolation_worked_by_hand",),
    ),
    Mutant(
        "caps per stage",
        "tutelage.plan.timetable:fit_amounts",
        caps_per_stage,
        (f"{_SCHEDULE}::test_a_cap_leaves_stages_as_long_as_they_were_promised",),
    ),
    Mutant(
        "passes restarted at a stage",
        "tutelage.plan.order:Order._interleave",
        passes_restarted_at_a_stage,
        (f"{_SCHEDULE}::test_a_scheduled_order_keeps_passes_and_shows_any_window",),
    ),
    Mutant(
        "largest remainder at each border",
        "tutelage.plan.timetable:round_curve",
        largest_remainder_at_each_border,
        (f"{_TIMETABLE}::test_units_go_to_the_earliest_deadline_and_not_to_the_largest_remainder",),
    ),
    Mutant(
        "stages shuffled into one another",
        "tutelage.plan.assemble:_cuts",
        stages_shuffled_into_one_another,
        (f"{_SCHEDULE}::test_a_gradual_change_is_followed_inside_a_hundred_steps",),
    ),
    Mutant(
        "online shares against the losses",
        "tutelage.plan.online:OnlineMixer._shares",
        online_shares_against_the_losses,
        (f"{_ONLINE}::test_shares_worked_by_hand",),
    ),
    Mutant(
        "online mixture forgotten on resume",
        "tutelage.plan.online_batches:OnlineBatches.restore",
        online_mixture_forgotten_on_resume,
        (f"{_ONLINE_RUN}::test_a_killed_run_ends_as_if_it_had_not_been",),
    ),
    Mutant(
        "polarity flipped",
        "tutelage.plan.weights:kind_table",
        polarity_flipped,
        (f"{_WEIGHTS}::test_response_trains_answers_and_stops",),
    ),
    Mutant(
        "stop token cut",
        "tutelage.plan.weights:kind_table",
        stop_token_cut,
        (f"{_WEIGHTS}::test_every_rule_trains_the_stop_token",),
    ),
    Mutant(
        "template tokens trained",
        "tutelage.plan.weights:kind_table",
        template_tokens_trained,
        (f"{_WEIGHTS}::test_instruction_modelling_trains_no_template_token_and_no_system_prompt",),
    ),
    Mutant(
        "turn weights ignored",
        "tutelage.plan.weights:weigh_tokens",
        turn_weights_ignored,
        (f"{_WEIGHTS}::test_many_documents_at_once_equal_each_alone",),
    ),
    Mutant(
        "marks left to the scaffold",
        "tutelage.plan.weights:weigh_tokens",
        marks_left_to_the_scaffold,
        (f"{_WEIGHTS}::test_marks_weigh_what_answers_weigh",),
    ),
    Mutant(
        "`turns: last` silences prompts",
        "tutelage.records:is_written",
        last_turn_only_silences_prompts,
        (f"{_WEIGHTS}::test_turns_last_silences_earlier_answers_and_no_prompt",),
    ),
    Mutant(
        "`turns: last` ignored",
        "tutelage.plan.weights:_counts_last_only",
        turns_ignored,
        (f"{_WEIGHTS}::test_turns_last_silences_earlier_answers_and_no_prompt",),
    ),
    Mutant(
        "normalised after the source weights",
        "tutelage.plan.normalise:ExampleWeights.settle",
        normalised_after_source_weights,
        (f"{_NORMALISE}::test_source_and_record_weights_come_after_normalising",),
    ),
    Mutant(
        "examples normalised per packed row",
        "tutelage.plan.batch:Batches._assemble",
        examples_normalised_per_row,
        (f"{_NORMALISE}::test_what_is_the_same_is_the_same_over_the_whole_run",),
    ),
    Mutant(
        "tasks normalised per step",
        "tutelage.plan.batch:Batches._assemble",
        tasks_normalised_per_step,
        (f"{_NORMALISE}::test_a_task_weighs_the_same_in_every_step",),
    ),
    Mutant(
        "first tokens tallied as targets",
        "tutelage.plan.tally:_runs",
        first_tokens_tallied,
        ("plan/test_tally.py::test_a_rule_over_the_tally_is_the_rule_over_the_tokens",),
    ),
    Mutant(
        "record weights by place",
        "tutelage.plan.join:_examples",
        record_weights_by_place,
        ("plan/test_weights_stage.py::test_record_weights_multiply_their_records_only",),
    ),
    Mutant(
        "targets counted once however often a record is visited",
        "tutelage.plan.sums:sum_cells",
        targets_counted_once,
        ("plan/test_sums.py::test_cells_are_summed_over_visits",),
    ),
    Mutant(
        "reasons of other records of the same table",
        "tutelage.plan.fates:Fates.put_each",
        fates_in_order_of_name,
        ("plan/test_fates.py::test_the_last_fate_that_was_given_stands",),
    ),
    Mutant(
        "documents of a row in the order of drawing",
        "tutelage.plan.kernels:sort_by_place",
        rows_in_packing_order,
        ("plan/test_kernels.py::test_documents_are_sorted_by_row_and_start",),
    ),
    Mutant(
        "shift after packing",
        "tutelage.plan.weights:shift_targets",
        shift_after_packing,
        (f"{_BATCHES}::test_no_document_learns_the_first_token_of_its_neighbour",),
    ),
    Mutant(
        "weights not shifted",
        "tutelage.plan.weights:shift_targets",
        weights_not_shifted,
        (f"{_BATCHES}::test_a_batch_equals_the_documents_laid_out_one_by_one",),
    ),
    Mutant(
        "positions not restarting",
        "tutelage.plan.batch:Batches._assemble",
        positions_not_restarting,
        (f"{_BATCHES}::test_a_batch_equals_the_documents_laid_out_one_by_one",),
    ),
    Mutant(
        "all ones over a pack",
        "tutelage.plan.batch:Batches._assemble",
        all_ones_over_a_pack,
        (f"{_BATCHES}::test_a_batch_equals_the_documents_laid_out_one_by_one",),
    ),
    Mutant(
        "next-fit packing",
        "tutelage.plan.fit:pack_lengths",
        next_fit_packing,
        ("plan/test_fit.py::test_as_many_rows_as_textbook_best_fit_decreasing",),
    ),
    Mutant(
        "emptiest rows wait for ever",
        "tutelage.plan.windows:_rows_to_keep",
        emptiest_rows_wait_for_ever,
        (f"{_WINDOWS}::test_an_awkward_document_does_not_wait_for_ever",),
    ),
    Mutant(
        "documents split at borders",
        "tutelage.plan.fit:pack_onto",
        documents_split_at_borders,
        ("plan/test_fit.py::test_every_document_lies_whole_in_one_row_and_none_overlap",),
    ),
    Mutant(
        "limit of documents ignored",
        "tutelage.plan.fit:pack_onto",
        document_limit_ignored,
        ("plan/test_fit.py::test_every_document_lies_whole_in_one_row_and_none_overlap",),
    ),
    Mutant(
        "waiting rows left half empty",
        "tutelage.plan.fit:pack_onto",
        waiting_rows_left_half_empty,
        (f"{_WINDOWS}::test_rows_that_wait_are_filled_up",),
    ),
    Mutant(
        "waiting documents forgotten",
        "tutelage.plan.windows:_still_waiting",
        waiting_documents_forgotten,
        (f"{_WINDOWS}::test_every_draw_has_its_own_slots_inside_a_row_of_its_step",),
    ),
    Mutant(
        "one window for the whole run",
        "tutelage.plan.windows:cut_windows",
        one_window_for_the_whole_run,
        (f"{_WINDOWS}::test_no_document_comes_many_windows_after_a_younger_one",),
    ),
    Mutant(
        "rows dealt to ranks in order",
        "tutelage.ranks:_micro_batches",
        rows_dealt_in_order,
        ("plan/test_ranks.py::test_rows_of_long_documents_are_spread_though_all_rows_are_full",),
    ),
    Mutant(
        "rows balanced by tokens",
        "tutelage.ranks:document_cost",
        rows_balanced_by_tokens,
        ("plan/test_ranks.py::test_attention_is_half_of_the_cost_at_six_widths",),
    ),
    Mutant(
        "rows not shuffled",
        "tutelage.plan.windows:_shuffle",
        rows_not_shuffled,
        (f"{_WINDOWS}::test_long_documents_are_spread_over_the_steps_of_a_window",),
    ),
    Mutant(
        "verdict polarity flipped",
        "tutelage.plan.join:_drops",
        verdict_polarity_flipped,
        ("plan/test_plan_stage.py::test_every_record_is_planned_or_has_one_reason",),
    ),
    Mutant(
        "mean of micro-batch means",
        "tutelage.train.step:_pass_gradients",
        mean_of_pass_means,
        (f"{_GRADIENT}::test_gradient_is_the_same_for_every_cut_and_layout",),
    ),
    Mutant(
        "loss weights as a mask",
        "tutelage.train.micro:flatten",
        weights_as_a_mask,
        (f"{_GRADIENT}::test_halving_every_weight_changes_nothing_and_doubling_one_document_repeats_it",),
    ),
    Mutant(
        "gradients summed in bfloat16",
        "tutelage.train.optimizer:_widen",
        sums_in_bfloat16,
        (f"{_GRADIENT}::test_bfloat16_weights_add_up_their_gradients_in_float32",),
    ),
    Mutant(
        "head counted for every token",
        "tutelage.train.flops:step_flops",
        head_counted_for_every_token,
        ("train/test_flops.py::test_a_fully_trained_model_is_counted_to_the_last_product",),
    ),
    Mutant(
        "frozen layers counted as trained",
        "tutelage.train.work:_is_trained",
        frozen_layers_counted_as_trained,
        ("train/test_flops.py::test_adapters_are_never_counted_for_more_than_they_do",),
    ),
    Mutant(
        "noise scaled by the row",
        "tutelage.model.noise:_bounds",
        noise_scaled_by_the_row,
        ("model/test_objective.py::test_noise_is_uniform_within_the_bound_of_its_own_document",),
    ),
    Mutant(
        "noise keyed by the step alone",
        "tutelage.model.objective:document_key",
        noise_from_the_step_alone,
        ("model/test_objective.py::test_keys_tell_seed_step_example_and_visit_apart",),
    ),
    Mutant(
        "DFT without stop-gradient",
        "tutelage.model.chunks:_slope_weights",
        dft_without_stop_gradient,
        ("model/test_objective.py::test_dft_weighs_each_token_by_its_own_probability",),
    ),
    Mutant(
        "KL the other way round",
        "tutelage.model.chunks:_pull",
        kl_the_other_way_round,
        ("model/test_objective.py::test_directions_by_hand",),
    ),
    Mutant(
        "KL against a start with dropout",
        "tutelage.model.start:_as_before",
        start_with_dropout,
        ("model/test_objective.py::test_the_start_of_an_adapter_is_the_model_without_it_and_without_dropout",),
    ),
    Mutant(
        "KL against a start that moves along",
        "tutelage.model.start:_frozen_copy",
        start_that_moves_along,
        ("model/test_objective.py::test_the_start_of_a_whole_model_stays_where_it_was_and_shares_what_is_frozen",),
    ),
    Mutant(
        "KL on trained places alone",
        "tutelage.model.loss:counted_rows",
        pull_by_loss_weight_alone,
        ("train/test_objectives.py::test_the_pull_through_a_step_is_the_formula",),
    ),
    Mutant(
        "checkpoints never found",
        "tutelage.train.shared_state:SharedCheckpoints.latest",
        checkpoints_never_found,
        (f"{_TRAIN}::test_a_finished_run_is_not_trained_again",),
    ),
    Mutant(
        "resume without random state",
        "tutelage.train.state:set_random_state",
        resume_without_random_state,
        (f"{_TRAIN}::test_a_run_killed_after_any_step_ends_to_the_bit_as_if_it_had_not_been",),
    ),
    Mutant(
        "resume that skips a batch",
        "tutelage.train.loop:Run.go_on",
        resume_that_skips_a_batch,
        (f"{_TRAIN}::test_a_run_killed_after_any_step_ends_to_the_bit_as_if_it_had_not_been",),
    ),
    Mutant(
        "deadline that forgets the checkpoint",
        "tutelage.train.stopping:StopRequest._reserve",
        deadline_without_the_checkpoint,
        ("train/test_kills.py::test_the_deadline_is_kept_wherever_one_pass_and_a_checkpoint_fit",),
    ),
    Mutant(
        "passes begun anew by an extension",
        "tutelage.plan.order:Behind.onward",
        passes_begun_anew_by_an_extension,
        ("plan/test_onward.py::test_two_parts_draw_what_one_order_would",),
    ),
    Mutant(
        "extension with a fresh optimizer",
        "tutelage.train.extend:begin_from",
        extension_with_a_fresh_optimizer,
        ("train/test_extend.py::test_two_parts_at_a_constant_rate_are_one_run_to_the_bit",),
    ),
    Mutant(
        "copies of held-out answers",
        "tutelage.evaluate.stage:_trained",
        copies_of_held_out_answers,
        ("evaluate/test_overfit.py::test_what_is_copied_is_measured_against_what_was_trained_on",),
    ),
    Mutant(
        "gap of two mixtures",
        "tutelage.report.overfit:_total",
        gap_of_two_mixtures,
        ("report/test_report_overfit.py::test_both_losses_of_the_total_are_of_one_mixture",),
    ),
    Mutant(
        "resume without the optimizer's moments",
        "tutelage.train.optimizer:Optimizer.restore",
        resume_without_moments,
        ("train/test_optimizer.py::test_restoring_goes_on_as_if_nothing_had_happened",),
    ),
    Mutant(
        "damaged checkpoint loaded",
        "tutelage.train.state:damage",
        damage_overlooked,
        ("train/test_checkpoints.py::test_a_flipped_byte_sends_the_run_to_the_checkpoint_before_with_a_message",),
    ),
    Mutant(
        "warmup counted into the fall",
        "tutelage.train.schedule:_fallen_share",
        warmup_counted_into_the_fall,
        ("train/test_schedule.py::test_cosine_has_its_golden_values",),
    ),
    Mutant(
        "turns counted within examples",
        "tutelage.audit.tokens:_Flat.of",
        turns_counted_within_examples,
        (f"{_AUDIT_TOKENS}::test_faults_of_one_example_do_not_touch_its_neighbours",),
    ),
    Mutant(
        "cut answers overlooked",
        "tutelage.audit.tokens:_cut_turns",
        cut_answers_overlooked,
        (f"{_AUDIT_TOKENS}::test_a_missing_stop_and_a_cut_answer_are_told_apart",),
    ),
    Mutant(
        "stops judged by their first token",
        "tutelage.audit.tokens:_last_stops",
        stops_judged_by_their_first_token,
        (f"{_AUDIT_TOKENS}::test_a_stop_is_judged_by_its_last_token",),
    ),
    Mutant(
        "ASCII white space trimmed only",
        "tutelage.render.groups:Letters.trimmed",
        ascii_trimmed_only,
        ("render/test_groups.py::test_trimming_bytes_is_trimming_text",),
    ),
    Mutant(
        "a token goes where it begins",
        "tutelage.render.kernels:label_cells",
        token_to_where_it_begins,
        ("render/test_groups.py::test_tokens_are_labelled_alike_by_loops_and_by_arrays",),
    ),
    Mutant(
        "blank texts filled in",
        "tutelage.render.groups:Together.fill",
        blank_texts_filled_in,
        ("render/test_groups.py::test_large_batches_are_laid_out_together",),
    ),
    Mutant(
        "every rendered example audited",
        "tutelage.audit.rendered:measure_set",
        every_rendered_example_audited,
        (f"{_AUDIT}::test_examples_that_are_not_planned_are_not_audited",),
    ),
    Mutant(
        "copies by half a key",
        "tutelage.audit.texts:first_of_equal",
        copies_by_half_a_key,
        ("audit/test_audit_texts.py::test_every_copy_points_at_the_first_of_its_equals",),
    ),
    Mutant(
        "threshold over all sources",
        "tutelage.audit.findings:_by_threshold",
        threshold_over_all_sources,
        ("audit/test_audit_findings.py::test_a_threshold_is_held_by_each_source_and_crossed_by_more",),
    ),
    Mutant(
        "zero weights overlooked",
        "tutelage.audit.stage:_Audit._without_weight",
        zero_weights_overlooked,
        (f"{_AUDIT}::test_every_planted_fault_is_found_in_its_records_and_in_no_others",),
    ),
    Mutant(
        "labels as targets",
        "tutelage.plan.trainers:labels_of",
        labels_as_targets,
        (f"{_EXPORT}::test_rows_for_trl_written_by_hand",),
    ),
    Mutant(
        "weights rounded to labels",
        "tutelage.plan.export:_OneWeight.check",
        weights_rounded_to_labels,
        (f"{_EXPORT}::test_a_fraction_in_the_last_step_is_found_too",),
    ),
    Mutant(
        "steps cut elsewhere",
        "tutelage.plan.export:_EqualRows.check",
        steps_cut_elsewhere,
        (f"{_EXPORT}::test_steps_of_unequal_rows_are_refused_but_not_for_weights",),
    ),
    Mutant(
        "existing folder wiped",
        "tutelage.plan.row_folder:check_folder",
        existing_folder_wiped,
        (f"{_EXPORT}::test_an_existing_folder_is_left_alone_until_asked_and_foreign_ones_always",),
    ),
    Mutant(
        "preview samples the first records",
        "tutelage.plan.sample:choose",
        first_of_the_file_for_a_sample,
        ("plan/test_sample.py::test_another_seed_or_name_draws_others_and_the_same_draws_the_same",),
    ),
    Mutant(
        "preview error without what was drawn",
        "tutelage.plan.sample:estimate_totals",
        sample_said_to_be_plain,
        ("plan/test_sample.py::test_the_stated_variance_is_the_real_one_on_average",),
    ),
    Mutant(
        "preview of dropped records",
        "tutelage.planning:_is_eligible",
        dropped_records_previewed,
        ("test_planning.py::test_a_preview_of_everything_is_the_plan",),
    ),
    Mutant(
        "visits needed as planned",
        "tutelage.plan.pictures:visits_needed",
        visits_needed_as_planned,
        ("plan/test_pictures.py::test_visits_needed_are_those_before_caps",),
    ),
    Mutant(
        "one promise for all units",
        "tutelage.report.plan_tables:promises",
        one_promise_for_all_units,
        ("report/test_plan_tables.py::test_a_share_of_tokens_is_carried_into_the_other_units_by_mean_lengths",),
    ),
    Mutant(
        "decay one step late",
        "tutelage.train.schedule:_num_decay_steps",
        decay_one_step_late,
        ("train/test_schedule.py::test_warmup_stable_decay_has_its_golden_values",),
    ),
    Mutant(
        "a group's own rate ignored",
        "tutelage.train.choice:Chosen.set_rate",
        rate_of_groups_ignored,
        ("train/test_choice.py::test_each_group_follows_the_schedule_from_its_own_peak",),
    ),
    Mutant(
        "an optimizer's numbers forgotten",
        "tutelage.train.memory:_entry",
        numbers_of_the_optimizer_forgotten,
        ("train/test_choice.py::test_any_optimizer_goes_on_from_what_was_kept_to_the_bit",),
    ),
    Mutant(
        "new rows of zeros",
        "tutelage.model.embeddings:make_room",
        new_rows_at(0.0),
        ("model/test_embeddings.py::test_new_rows_are_the_mean_of_the_old_and_old_logits_stay",),
    ),
    Mutant(
        "new rows at random",
        "tutelage.model.embeddings:make_room",
        new_rows_at(0.02),
        ("model/test_embeddings.py::test_new_rows_are_the_mean_of_the_old_and_old_logits_stay",),
    ),
    Mutant(
        "merged without alpha / rank",
        "tutelage.model.save:merge_and_save",
        merged_without_its_scale,
        ("model/test_load_save.py::test_a_merged_model_answers_like_its_adapter_and_the_adapter_stays",),
    ),
    Mutant(
        "patterns as prefixes",
        "tutelage.model.patterns:matches",
        patterns_as_prefixes,
        ("model/test_freeze.py::test_brackets_and_stars_are_those_of_a_shell",),
    ),
    Mutant(
        "passes rounded down",
        "tutelage.train.batching:solve",
        passes_rounded_down,
        ("train/test_batching.py::test_passes_hold_every_row_and_one_pass_less_would_not",),
    ),
    Mutant(
        "masters rounded to the nearest",
        "tutelage.train.rounding:round_into",
        masters_rounded_to_the_nearest,
        ("train/test_rounding.py::test_a_small_rate_learns_in_bfloat16_what_it_learns_in_float32",),
    ),
    Mutant(
        "draws by place in the piece",
        "tutelage.train.rounding:round_into",
        draws_by_place_in_the_piece,
        ("train/test_rounding.py::test_the_loop_is_the_torch_it_stands_for_and_pieces_are_the_whole",),
    ),
    Mutant(
        "memory of a pass without its fixed part",
        "tutelage.train.fitting:_estimated",
        passes_without_a_fixed_part,
        ("train/test_fitting.py::test_rows_follow_from_two_measurements_and_the_limit",),
    ),
    Mutant(
        "the Trainer divides by its passes",
        "tutelage.train.engines.hf_trainer:TrainerRun.gradients",
        trainer_divides_by_passes,
        ("train/test_hf_trainer.py::test_the_trainer_does_what_the_loop_does",),
    ),
    Mutant(
        "rows padded on the left without a mask",
        "tutelage.model.unpacked:padded_rows",
        padded_on_the_left,
        ("model/test_unpacked.py::test_a_state_space_model_runs_as_rows_and_each_row_is_as_alone",),
    ),
    Mutant(
        "an adapter's stops forgotten",
        "tutelage.model.names:describe",
        stops_of_the_base_alone,
        ("model/test_load_save.py::test_a_saved_adapter_reloads_in_plain_peft_and_here",),
    ),
]


# Modules imported before pytest cannot have their asserts rewritten, and need not.
_QUIETLY = ("-p", "no:cacheprovider", "-q", "-x", "-s", "--tb=no", "-rfE")
_QUIETLY += ("-W", "ignore::pytest.PytestAssertRewriteWarning")


def run_mutants(names: Sequence[str]) -> dict[str, list[str]]:
    """The tests that fail per mutant ("" = none planted, all named tests), collected once and run in a fork for each."""
    import pytest

    for mutant in MUTANTS:
        importlib.import_module(mutant.target.partition(":")[0])
    os.environ["TUTELAGE_MUTANT"] = ""
    forks = _Forks(names)
    tests = sorted({test for name in names for test in _tests_of(name)})
    with contextlib.redirect_stdout(sys.stderr):
        code = pytest.main([*_QUIETLY, *(str(HERE / test) for test in tests)], plugins=[forks])
    sys.stderr.flush()
    if forks.in_child:
        os._exit(int(code))
    assert set(forks.failing) == set(names), f"pytest ended with {code}"
    return forks.failing


def _tests_of(name: str) -> Sequence[str]:
    return by_name(name).tests if name else [test for mutant in MUTANTS for test in mutant.tests]


class _Forks:
    """Pytest goes on in a child for each name, with that mutant and its tests; the parent runs none and keeps what failed."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.failing: dict[str, list[str]] = {}
        self.in_child = False

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed:
            return None  # pytest's own loop says what could not be collected
        gc.collect()
        gc.freeze()  # or every child would walk, and so copy, all that the parent imported
        for name in self.names:
            with tempfile.TemporaryFile("w+") as output:
                sys.stderr.flush()
                if (child := os.fork()) == 0:
                    self.in_child = True
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                    self._prepare(name, session)
                    return None
                _, status = os.waitpid(child, 0)
                output.seek(0)
                self.failing[name] = _failing(name, os.waitstatus_to_exitcode(status), output.read())
        return True

    @staticmethod
    def _prepare(name: str, session: pytest.Session) -> None:
        ids = tuple(f"{HERE.name}/{test}" for test in _tests_of(name))
        session.items = [
            item for item in session.items if item.nodeid in ids or item.nodeid.startswith(tuple(f"{id}[" for id in ids))
        ]
        os.environ["TUTELAGE_MUTANT"] = name
        if name:
            plant(by_name(name))


def _failing(name: str, code: int, said: str) -> list[str]:
    failing = re.findall(r"^(?:FAILED|ERROR) \S*?(\S+::\S+)", said, re.MULTILINE)
    # A planting that fails is no rejection.
    assert code == 0 or (code == 1 and failing), f"{name or 'without a mutant'}: pytest ended with {code}\n{said}"
    return failing


if __name__ == "__main__":
    sys.path[:0] = [str(HERE)]
    sys.modules["mutants"] = sys.modules["__main__"]
    chosen = sys.argv[1:] or ["", *(mutant.name for mutant in MUTANTS)]
    sys.stdout.write(json.dumps(run_mutants(chosen), indent=1) + "\n")

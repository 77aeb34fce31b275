"""Wrong programs, each a mistake that somebody has shipped, and the tests that must reject it.

A suite that cannot fail proves nothing. Every entry names a function (`module:function` or `module:Class.method`), a
replacement (called with the right one, returns the wrong one) and the tests of which at least one must fail with it in
place. `test_mutants.py` runs them; add an entry by appending to `MUTANTS`.

    python tests/mutants.py [NAME ...]       runs them from a shell and prints what each left failing, as JSON
"""

from __future__ import annotations

import dataclasses
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
from typing import Any

import numpy as np

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
    def settle(level: Fraction, shares: dict[str, int], caps: dict[str, int]) -> dict[str, int]:
        quotas = {name: min(level * share, Fraction(caps.get(name, level * share))) for name, share in shares.items()}
        counts = {name: math.floor(quota) for name, quota in quotas.items()}
        counts[max(quotas, key=lambda name: quotas[name])] += round(sum(quotas.values())) - sum(counts.values())
        return counts

    return settle


def int_truncation(_: Function) -> Function:
    return lambda level, shares, caps: {n: int(min(level * s, caps.get(n, level * s))) for n, s in shares.items()}


def cap_ignored_on_refill(right: Function) -> Function:
    return lambda level, shares, caps: right(level, shares, {})


def refill_once(_: Function) -> Function:
    """Pours the freed budget out a single time, so that tasks which the refill pushes over their cap stay over or short."""

    def fill(shares: dict[str, int], total: Fraction, caps: dict[str, int], prices: dict[str, int]) -> Fraction:
        level = total / sum(shares[n] * prices[n] for n in shares)
        over = [n for n in shares if level * shares[n] > caps.get(n, math.inf)]
        rest = [n for n in shares if n not in over]
        if not over or not rest:
            return level
        left = total - sum(caps[n] * prices[n] for n in over)
        return Fraction(left, sum(shares[n] * prices[n] for n in rest))

    return fill


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


# --- plan: packing, windows, joining


def next_fit_packing(_: Function) -> Function:
    from tutelage.plan.fit import Packing

    def pack(lengths: Sequence[int], *, capacity: int) -> Packing:
        rows, starts, row, used = [], [], 0, 0
        for length in lengths:
            if used + length > capacity:
                row, used = row + 1, 0
            rows.append(row)
            starts.append(used)
            used += length
        return Packing(np.array(rows, np.int32), np.array(starts, np.int32), row + (used > 0))

    return pack


def emptiest_rows_wait_for_ever(right: Function) -> Function:
    return lambda rows, lengths, *, num_rows, most, num_carried: right(rows, lengths, num_rows=num_rows, most=most, num_carried=0)


def rows_not_shuffled(_: Function) -> Function:
    return lambda num, *, seed, window: np.arange(num)


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
    def gradients(model: Any, flat: Any, part: Any, *, total_weight: float, device: Any) -> Any:
        own = float(flat.weights[part.start : part.stop].sum())
        share = (part.stop - part.start) / len(flat.inputs)
        return right(model, flat, part, total_weight=own / share or 1.0, device=device)

    return gradients


def weights_as_a_mask(right: Function) -> Function:
    def flat(batch: Any) -> Any:
        made = right(batch)
        return dataclasses.replace(made, weights=(made.weights > 0).astype(np.float32))

    return flat


def checkpoints_never_found(_: Function) -> Function:
    return lambda self: None


def resume_without_random_state(_: Function) -> Function:
    return lambda states, device: None


def resume_without_moments(right: Function) -> Function:
    return lambda self, weights, memory=None: right(self, weights)


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


_TRAIN, _GRADIENT = "train/test_loop.py", "train/test_gradient.py"
_AUDIT_TOKENS, _AUDIT = "audit/test_audit_tokens.py", "audit/test_audit_stage.py"
_RATES, _ORDER, _WEIGHTS = "plan/test_rates.py", "plan/test_order.py", "plan/test_weights.py"
_WINDOWS, _BATCHES = "plan/test_windows.py", "plan/test_batches.py"
MUTANTS: list[Mutant] = [
    Mutant(
        "remainder to the largest",
        "tutelage.plan.rates:_settle",
        remainder_to_the_largest,
        (f"{_RATES}::test_counts_are_the_largest_remainder_method",),
    ),
    Mutant(
        "int(total * w) truncation",
        "tutelage.plan.rates:_settle",
        int_truncation,
        (f"{_RATES}::test_counts_sum_to_the_total_exactly",),
    ),
    Mutant(
        "cap ignored on refill",
        "tutelage.plan.rates:_settle",
        cap_ignored_on_refill,
        (f"{_RATES}::test_no_count_is_above_its_cap",),
    ),
    Mutant(
        "refill poured once",
        "tutelage.plan.rates:_fill",
        refill_once,
        (f"{_RATES}::test_the_books_example_stops_at_11500_and_reaches_15000_with_refill",),
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
        "rows not shuffled",
        "tutelage.plan.windows:_shuffle",
        rows_not_shuffled,
        (f"{_WINDOWS}::test_long_documents_are_spread_over_the_steps_of_a_window",),
    ),
    Mutant(
        "verdict polarity flipped",
        "tutelage.plan.stage:_drops",
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
        "checkpoints never found",
        "tutelage.train.state:Checkpoints.latest",
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
]


# Modules imported before the fork cannot have their asserts rewritten, and need not.
_QUIETLY = ("-p", "no:cacheprovider", "-q", "-x", "--tb=no", "-rfE", "-W", "ignore::pytest.PytestAssertRewriteWarning")


def run_mutants(names: Sequence[str]) -> dict[str, list[str]]:
    """The tests that fail per mutant ("" = none planted, all named tests). Forks after the imports, which cost the most."""
    for mutant in MUTANTS:
        importlib.import_module(mutant.target.partition(":")[0])
    return {name: _run_forked(name) for name in names}


def _run_forked(name: str) -> list[str]:
    import pytest

    tests = by_name(name).tests if name else sorted({test for mutant in MUTANTS for test in mutant.tests})
    with tempfile.TemporaryFile("w+") as output:
        if (child := os.fork()) == 0:
            os.environ["TUTELAGE_MUTANT"] = name
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            code = pytest.main([*_QUIETLY, *(str(HERE / test) for test in tests)])
            sys.stdout.flush()
            os._exit(int(code))
        _, status = os.waitpid(child, 0)
        output.seek(0)
        said = output.read()
    code = os.waitstatus_to_exitcode(status)
    failing = re.findall(r"^(?:FAILED|ERROR) \S*?(\S+::\S+)", said, re.MULTILINE)
    # A test that cannot be found, or a planting that fails, is no rejection.
    assert code == 0 or (code == 1 and failing), f"{name or 'without a mutant'}: pytest ended with {code}\n{said}"
    return failing


if __name__ == "__main__":
    sys.path[:0] = [str(HERE)]
    sys.modules["mutants"] = sys.modules["__main__"]
    chosen = sys.argv[1:] or ["", *(mutant.name for mutant in MUTANTS)]
    sys.stdout.write(json.dumps(run_mutants(chosen), indent=1) + "\n")

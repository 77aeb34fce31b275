"""Several processes: the same losses, gradient norms and weights as one, whatever is shared out and however."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from several import in_ranks
from tiny_ranks import Found, Tiny, batches_of, run_tiny_ranks, tiny_model_of
from tiny_training import Look, make_batch, make_docs
from tutelage.errors import TrainError
from tutelage.train.micro import flatten
from tutelage.train.shared_state import rank_seed
from tutelage.train.shares import share_of
from tutelage.world import ALONE, World, current, differing

FULL, LORA = Tiny(), Tiny(adapter=True, tied=False)
CASES = {
    "full, tied": FULL,
    "full, untied, two rows a pass": Tiny(tied=False, micro_batch_rows=2),
    "lora": LORA,
    "full in bfloat16": Tiny(narrow=True),
    "full, tied, cut": dataclasses.replace(FULL, parallel="fsdp"),
    "full, untied, cut": Tiny(tied=False, parallel="fsdp"),
    "lora, cut": dataclasses.replace(LORA, parallel="fsdp"),
    "full in bfloat16, cut": Tiny(narrow=True, parallel="fsdp"),
    "lora over bfloat16, cut": Tiny(narrow=True, adapter=True, parallel="fsdp"),
}


def run_all(folder: Path, cases: Mapping[str, Tiny]) -> dict[str, Found]:
    """Every case after the other, in folders of their own that all ranks share."""
    found = {}
    for name, tiny in cases.items():
        here = folder / name
        here.mkdir(parents=True, exist_ok=True)
        found[name] = run_tiny_ranks(here, tiny)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return run_all(tmp_path_factory.mktemp("alone"), CASES)


def assert_same(one: Found, other: Found, *, narrow: bool = False) -> None:
    """Float64 runs agree to rounding; bfloat16 ones to what float32 sums of their gradients allow."""
    close: dict[str, float] = {"rtol": 2e-3, "atol": 2e-4} if narrow else {"rtol": 1e-11, "atol": 1e-13}
    np.testing.assert_allclose(other.losses, one.losses, **close)
    np.testing.assert_allclose(other.norms, one.norms, **close)
    assert one.weights.keys() == other.weights.keys()
    for name, weight in one.weights.items():
        np.testing.assert_allclose(other.weights[name], weight, **close, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "names"), [(2, tuple(CASES)), (4, ("full, tied", "full, tied, cut", "lora, cut"))])
def test_any_number_of_ranks_trains_as_one_process(
    alone: dict[str, Found], tmp_path: Path, size: int, names: Sequence[str]
) -> None:
    """Kills: W of a rank's own rows, sums not averaged, skipped passes, a reduction per pass, bfloat16 sums, fillers that count."""
    cases = {name: CASES[name] for name in names}
    found = in_ranks(size, run_all, tmp_path, cases)
    for name, tiny in cases.items():
        assert_same(alone[name], found[0][name], narrow=tiny.narrow)


def one_step(tiny: Tiny) -> dict[str, np.ndarray]:
    """The whole gradient of the step that holds a row without weight, as this rank sees it."""
    from tutelage.train.optimizer import Optimizer
    from tutelage.train.parallel import parallelise
    from tutelage.train.spec import TrainSpec
    from tutelage.train.step import step_gradients

    model = tiny_model_of(tiny)
    parallel = parallelise(model, current(), kind=tiny.parallel)
    optimizer = Optimizer(model, TrainSpec())
    step_gradients(model, batches_of(2)[1], micro_batch_rows=1, parallel=parallel)
    parallel.average(optimizer.weights)
    whole = {name: getattr(w.grad, "full_tensor", lambda w=w: w.grad)() for name, w in optimizer.weights.items()}
    return {name: gradient.numpy() for name, gradient in whole.items()}


def some_steps(cases: Sequence[Tiny]) -> list[dict[str, np.ndarray]]:
    """Each case's gradient."""
    return [one_step(tiny) for tiny in cases]


def test_two_ranks_make_the_gradient_of_one() -> None:
    """Kills: W of a rank's own rows, masters in float32 that are summed and not averaged; a rank that skips its part."""
    cases = [LORA, dataclasses.replace(LORA, parallel="fsdp"), Tiny(narrow=True)]
    right = some_steps(cases)
    for found in in_ranks(2, some_steps, cases):
        for tiny, one, other in zip(cases, right, found, strict=True):
            for name, gradient in one.items():
                close = {"rtol": 2e-2, "atol": 1e-3 * np.abs(gradient).max()} if tiny.narrow else {"rtol": 1e-10, "atol": 1e-14}
                np.testing.assert_allclose(other[name], gradient, **close, err_msg=f"{name} of {tiny}")


def run_on(folder: Path, cases: Mapping[str, Tiny]) -> dict[str, Found]:
    """The runs in `folder`, gone on from the checkpoints that are left there."""
    return run_all(folder, cases)


def cut_back(source: Path, target: Path) -> Path:
    """A copy of finished runs without what came after their second step."""
    shutil.copytree(source, target)
    for checkpoint in target.glob("*/checkpoints/step-000004"):
        shutil.rmtree(checkpoint)
    return target


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_and_another_layout(tmp_path: Path) -> None:
    """Kills: checkpoints that only the same ranks can read, moments that stay behind, weights of one rank taken for all."""
    kept = {"num_steps": 4, "save_every": 2, "changes": (("keep_checkpoints", 9),)}
    cases = {name: dataclasses.replace(CASES[name], **kept) for name in ("full, tied, cut", "lora, cut", "lora")}
    whole = run_all(tmp_path / "whole", cases)
    in_ranks(2, run_all, tmp_path / "two", cases)
    assert (tmp_path / "two" / "lora, cut" / "checkpoints" / "step-000004" / "weights").is_dir()
    swapped = {name: dataclasses.replace(t, parallel="ddp" if t.parallel == "fsdp" else "fsdp") for name, t in cases.items()}
    from_two = partial(cut_back, tmp_path / "two")
    found = {
        "two, then one": run_on(from_two(tmp_path / "then one"), cases),
        "two, then four": in_ranks(4, run_on, from_two(tmp_path / "then four"), {"lora, cut": cases["lora, cut"]})[0],
        "cut, then whole, and whole, then cut": in_ranks(2, run_on, from_two(tmp_path / "swapped"), swapped)[0],
        "one, then two": in_ranks(2, run_on, cut_back(tmp_path / "whole", tmp_path / "then two"), cases)[0],
    }
    for way in found.values():
        for name, other in way.items():
            assert_same(whole[name], other)


def stop_and_go_on(folder: Path, tiny: Tiny) -> tuple[Found, Found]:
    """(a run, its last steps once more from a checkpoint), with dropout, in which every rank draws for itself."""
    one = run_tiny_ranks(folder, tiny)
    if current().is_first:
        shutil.rmtree(folder / "checkpoints" / "step-000004")
    current().barrier()
    return one, run_tiny_ranks(folder, tiny)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_the_same_ranks_go_on_to_the_bit(tmp_path: Path, parallel: str) -> None:
    """Kills: a rank that draws its dropout anew after a resume, or draws what the first draws; sums in another order (three ranks)."""
    tiny = Tiny(adapter=True, parallel=parallel, dropout=0.3, num_steps=4, save_every=2)
    one, two = in_ranks(3, stop_and_go_on, tmp_path, tiny)[0]
    assert (one.losses, one.norms) == (two.losses, two.norms)
    for name, weight in one.weights.items():
        assert np.array_equal(weight, two.weights[name]), name


def disagree(folder: Path) -> list[str]:
    """What is said of ranks that begin with other weights, and what a rank sees that measures something else."""
    said = []
    try:
        run_tiny_ranks(folder, dataclasses.replace(LORA, seed=current().rank))
    except TrainError as error:
        said.append(str(error))
    try:
        run_tiny_ranks(folder, LORA, measure=lambda model, step: Look(3.0 - current().rank * step))
    except TrainError as error:
        said.append(str(error))
    return said


def test_ranks_that_are_not_at_one_stop_and_say_who_has_what(tmp_path: Path) -> None:
    """Kills: ranks that train on from other weights, or decide for themselves which step was best."""
    for said in in_ranks(2, disagree, tmp_path):
        assert "the starting model differs between the processes of this run" in said[0] and "on rank 1" in said[0]
        assert "the held-out loss after step 1 differs" in said[1]


def talk() -> list[Any]:
    """Everything that a world can do."""
    world = current()
    if world.is_first:
        world.tell("greeting", {"says": "ä"})
    agree = world.agree
    assert agree is not None
    return [
        world.hear("greeting") if not world.is_first else None,
        world.gather("x" * world.rank),
        world.first(world.rank + 5),
        world.total(np.array([world.rank, 0.5])).tolist(),
        agree(world.rank * 15),
    ]


def test_ranks_hear_one_another() -> None:
    """Kills: gathering what the longest or the first said, sums over one rank, an agreement that one rank makes alone."""
    first, *others = in_ranks(3, talk)
    assert first == [None, ["", "x", "xx"], 5, [3.0, 1.5], 30]
    assert all(other == [{"says": "ä"}, *first[1:]] for other in others)


def test_a_process_alone_needs_nobody() -> None:
    """Kills: collectives that ask for a process group in a plain run."""
    assert current() is ALONE and ALONE.is_first and ALONE.agree is None
    assert ALONE.gather({"a": 1}) == [{"a": 1}] and ALONE.first(3) == 3
    assert ALONE.total(np.array([2.0])).tolist() == [2.0]
    ALONE.barrier()
    ALONE.require_same("it", 1)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=7), st.integers(1, 5), st.integers(1, 3), st.integers(0, 9))
def test_shares_hold_every_token_once_and_as_many_passes_each(
    sizes: Sequence[int], num_ranks: int, rows_per_pass: int, seed: int
) -> None:
    """Kills: rows dealt twice or left out, ranks that run fewer passes and let the others wait, columns out of step."""
    docs = make_docs(sum(sizes) + 1, seed=seed)
    ends = np.cumsum([1, *sizes])
    batch = make_batch([docs[:1], *(docs[a:b] for a, b in pairwise(ends))], capacity=64)
    flat = flatten(batch)
    more: dict[str, Any] = {"num_rows": batch.num_rows, "rows_per_pass": rows_per_pass, "hidden_size": 8}
    shares = [share_of(flat, rank=rank, num_ranks=num_ranks, **more) for rank in range(num_ranks)]
    assert len({len(share.passes) for share in shares}) == 1
    real = np.concatenate([share.tokens[share.tokens >= 0] for share in shares])
    assert np.array_equal(np.sort(real), np.arange(len(flat.inputs)))
    for share in shares:
        mine = share.tokens >= 0
        for column in ("inputs", "targets", "positions", "weights", "tasks", "sources", "kinds"):
            assert np.array_equal(getattr(share.flat, column)[mine], getattr(flat, column)[share.tokens[mine]])
        assert not share.flat.weights[~mine].any()
        assert sum(share.flat.lengths) == len(share.tokens) == share.passes[-1].stop
        assert [n for part in share.passes for n in part.lengths] == share.flat.lengths.tolist()
        assert [doc.length for doc in share.flat.documents] == share.flat.lengths.tolist()
    whole = sum(share.spread(np.stack([share.flat.weights, share.flat.weights]), len(flat.inputs)) for share in shares)
    assert np.array_equal(whole, np.stack([flat.weights, flat.weights]))


def test_ranks_draw_from_sources_of_their_own() -> None:
    """Kills: the same dropout on every rank, and a first rank that draws otherwise than a process alone."""
    seeds = [rank_seed(3, rank=rank, step=step) for rank in range(4) for step in (0, 2)]
    assert seeds[0] == 3 and len(set(seeds)) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_batches_of_this_file_hold_a_row_without_weight() -> None:
    """Kills: cases too even to show a skipped pass."""
    assert any(not (batch.weights > 0).any(1).all() for batch in batches_of(2))
    assert differing(["a", "a"]) == "" and World(1, 2) == World(1, 2, store=object())

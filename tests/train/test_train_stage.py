"""Training as a box of the pipeline: what it leaves, and that only its inputs decide it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from tiny_training import SOURCES, TASKS, make_batches, measure_with
from toy import IM_END, save_tiny, toy_tokenizer
from tutelage import tables
from tutelage.errors import TrainError
from tutelage.evaluate.spec import EvaluateSpec
from tutelage.model.spec import Full, Lora, ModelSpec
from tutelage.store import Artefact, Counts, Outcome, Progress, Silent, Stage, Store
from tutelage.train.spec import Kl, TrainSpec
from tutelage.train.stage import Making, TrainInputs, train_stage

NUM_STEPS = 4
LORA = ModelSpec(adapter=Lora(rank=4, alpha=8.0, dropout=0.1))
NOTHING = Outcome(Counts(0, 0))


class Killed(Exception):
    """Stands for a process that is gone."""


class DiesAfter(Silent):
    """Ends the world after so many steps."""

    def __init__(self, num_steps: int) -> None:
        self.left = num_steps

    def advance(self, amount: int = 1, text: str = "") -> None:
        self.left -= bool(text)
        if self.left == 0:
            raise Killed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base"))


def box(name: str, write: Any = lambda folder: None, slot: str = "", **facts: Any) -> Stage:
    """A hand-made upstream artefact."""

    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        write(folder)
        return Outcome(Counts(0, 0), facts)

    return Stage(name, 1, {"facts": str(facts)}, build, slot=slot)


def write_plan(folder: Path) -> None:
    """A plan of `make_batches`: every document is an example of its own, visited once."""
    batches = make_batches(NUM_STEPS)
    documents = [(batch.step, doc) for batch in batches for doc in batch.documents]
    planned = [
        {"source": SOURCES[i % 2], "shard": "render", "index": i, "row": i, "part": 0, "task": TASKS[i % 3],
         "num_tokens": doc.length, "multiplier": 1.0, "weight": 1.0, "num_visits": 1}
        for i, (_, doc) in enumerate(documents)
    ]  # fmt: skip
    placed = [
        {"row": step * 3 + doc.row, "example": i, "visit": 0, "start": doc.start, "length": doc.length}
        for i, (step, doc) in enumerate(documents)
    ]
    steps = [
        {"step": b.step, "window": 0, "first_row": b.step * 3, "num_rows": 3, "num_examples": 6, "real_tokens": b.real_tokens,
         "slots": b.inputs.size, "total_weight": b.total_weight}
        for b in batches
    ]  # fmt: skip
    for name, rows, schema in (
        ("planned", planned, tables.PLANNED),
        ("placements", placed, tables.PLACEMENTS),
        ("steps", steps, tables.PLAN_STEPS),
    ):
        tables.write_table(folder / f"{name}.parquet", pa.Table.from_pylist(rows, schema=schema))


def stage(base: Path, *, adapter: ModelSpec = LORA, losses: Any = None, changes: Any = None, evaluate: Any = None) -> Stage:
    inputs = TrainInputs(
        model=box("model", folder=str(base)),
        tokenizer=box("tokenizer", lambda folder: toy_tokenizer().save_pretrained(folder)),
        plan=box("plan", write_plan, tasks=list(TASKS), sources=list(SOURCES)),
        shards={"render left": box("render", slot="left", stop_ids=[IM_END, 10])},
        held_out=box("held_out"),
    )
    given = {"device": "cpu", "dtype": "float32", "learning_rate": 1e-2, "checkpoint_every_steps": 1, "num_threads": 1}
    making = Making(
        lambda artefacts: make_batches(NUM_STEPS), lambda artefacts: measure_with(losses or (lambda step: 3.0 - step))
    )
    spec = TrainSpec(**(given | (changes or {})))
    section = EvaluateSpec(**({"every_steps": 2} | (evaluate or {})))
    return train_stage(inputs, model_spec=adapter, spec=spec, evaluate=section, making=making)


def produce(store: Store, box: Stage, progress: Progress | None = None) -> Artefact:
    return store.produce(box, {name: store.produce(upstream, {}) for name, upstream in box.inputs.items()}, progress)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_it_leaves_a_model_and_the_whole_record_of_its_making(base: Path, tmp_path: Path) -> None:
    """Kills a stage that forgets a file which the report reads, or a fact that people ask for."""
    made = produce(Store(tmp_path), stage(base))
    for name in ("model", "steps.parquet", "events.jsonl", "evals.parquet", "samples.parquet", "dropped.parquet", "checkpoints"):
        assert made.file(name)
    assert made.manifest["counts"] == {"in": 24, "out": 24, "dropped": {}}
    facts = made.facts
    assert (facts["num_steps"], facts["steps_done"], facts["final_step"], facts["best_step"]) == (4, 4, 4, 4)
    assert (facts["device"], facts["dtype"], facts["dtype_reason"]) == ("cpu", "float32", "as the recipe says")
    assert (facts["model_kind"], facts["stop_ids"]) == ("lora", [10, IM_END])
    assert facts["tokens_per_second"] > 0 and facts["peak_memory_bytes"] > 10**8 and facts["num_trained_weights"] > 1000
    assert [s.step for s in tables.read_scores(made.file("evals.parquet"))] == [0, 2, 4]
    assert len(list(made.file("checkpoints").iterdir())) == 3
    assert json.loads((made.path / "model" / "generation_config.json").read_text())["eos_token_id"] == [IM_END, 10]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft calls it
def test_plain_peft_loads_the_adapter_and_it_does_what_it_did_in_the_run(base: Path, tmp_path: Path) -> None:
    """Kills a folder that only our own code can read, and one that holds other weights than the best checkpoint."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    made = produce(Store(tmp_path), stage(base, losses=lambda step: abs(step - 2)))
    assert made.facts["final_step"] == 2
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), made.path / "model")
    found = {name.replace(".default", ""): value for name, value in plain.state_dict().items() if "lora_" in name}
    kept = load_file(made.path / "checkpoints" / "step-000002" / "weights.safetensors")
    assert {name.replace(".default", "") for name in kept} == set(found)
    assert all(torch.equal(found[name.replace(".default", "")], value) for name, value in kept.items())


def test_a_fully_tuned_bfloat16_model_loads_with_plain_transformers(base: Path, tmp_path: Path) -> None:
    """Kills masters that never reach the model that is saved."""
    from transformers import AutoModelForCausalLM

    made = produce(Store(tmp_path), stage(base, adapter=ModelSpec(adapter=Full()), changes={"dtype": "bfloat16"}))
    tuned = AutoModelForCausalLM.from_pretrained(made.path / "model")
    start = AutoModelForCausalLM.from_pretrained(base)
    assert tuned.dtype == torch.bfloat16 and made.facts["model_kind"] == "full"
    moved = [not torch.equal(a, b.bfloat16()) for a, b in zip(tuned.parameters(), start.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("adapter", [LORA, ModelSpec(adapter=Full())], ids=["lora", "full"])
def test_a_killed_training_resumes_to_the_same_files(base: Path, tmp_path: Path, adapter: ModelSpec) -> None:
    """Kills a resume that measures the dtype again, starts anew, or leaves half of an exported model."""
    calm, rough = Store(tmp_path / "calm"), Store(tmp_path / "rough")
    box = stage(base, adapter=adapter, changes={"dtype": "bfloat16"})
    for _ in range(2):
        with pytest.raises(Killed):
            produce(rough, box, DiesAfter(2))
    expected, found = produce(calm, box), produce(rough, box)
    assert digests(found.path / "model") == digests(expected.path / "model")
    lines = (found.path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"event": "step"' in line] == [0, 1, 2, 3]


def test_dtype_is_decided_once_and_remembered(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills `dtype: auto` that measures bfloat16 before the kill and float32 after it."""
    answers = iter([("bfloat16", "twice as fast"), ("float32", "slower today")])
    monkeypatch.setattr("tutelage.model.load.choose_dtype", lambda device: next(answers))
    store, box = Store(tmp_path), stage(base, changes={"dtype": "auto"})
    with pytest.raises(Killed):
        produce(store, box, DiesAfter(1))
    assert produce(store, box).facts["dtype"] == "bfloat16"


def test_a_device_that_is_gone_is_said(base: Path, tmp_path: Path) -> None:
    """Kills a run that goes on from a GPU's checkpoint on a CPU with other numbers."""
    store, box = Store(tmp_path), stage(base)
    with pytest.raises(Killed):
        produce(store, box, DiesAfter(1))
    path = tmp_path / "work" / f"train-{box.key}" / "setup.json"
    path.write_text(path.read_text().replace('"cpu"', '"mps"'))
    with pytest.raises(TrainError, match="this run began on mps, which is not available now"):
        produce(store, box)


def test_early_stopping_accounts_for_the_examples_never_met(base: Path, tmp_path: Path) -> None:
    """Kills an account that claims examples which no step has seen."""
    made = produce(Store(tmp_path), stage(base, losses=lambda step: float(step), evaluate={"every_steps": 1, "stop_after": 2}))
    assert made.facts["is_stopped_early"] and made.facts["steps_done"] == 2
    assert made.manifest["counts"] == {"in": 24, "out": 12, "dropped": {"early_stopping": 12}}
    dropped = tables.read_dropped(made.file("dropped.parquet"))
    assert [d.row for d in dropped] == list(range(12, 24)) and dropped[0].source == "left"
    assert "after step 2, before this record's first visit" in dropped[0].detail


def test_a_step_that_goes_wrong_names_the_records(base: Path, tmp_path: Path) -> None:
    """Kills example numbers that nobody can look up."""
    box = stage(base, losses=lambda step: 1.0, changes={"learning_rate": 1e30, "max_grad_norm": None})
    with pytest.raises(
        TrainError, match=r"step \d: the (loss|gradient) is not finite in \d documents: record \d+ of (left|right)"
    ):
        produce(Store(tmp_path), box)


def test_what_changes_no_number_is_no_part_of_the_key(base: Path) -> None:
    """Kills a retraining because somebody wants more checkpoints kept, and a hit when the rate changed."""
    key = stage(base).key
    assert stage(base, changes={"keep_checkpoints": 9, "checkpoint_every_steps": 7, "trackers": ("tensorboard",)}).key == key
    assert stage(base, changes={"micro_batch_rows": 1, "stop_within_seconds": 5.0, "requeue_exit_code": 75}).key == key
    for change in ({"learning_rate": 1e-3}, {"seed": 1}, {"max_grad_norm": 0.5}):
        assert stage(base, changes=change).key != key
    assert stage(base, evaluate={"every_steps": 1}).key != key


def test_rows_per_pass_that_were_found_are_kept_for_the_next_try(base: Path, tmp_path: Path) -> None:
    """Kills a resumed run that looks again on a busier machine and cuts its steps otherwise."""
    store, box = Store(tmp_path), stage(base, changes={"micro_batch_rows": "auto"})
    with pytest.raises(Killed):
        produce(store, box, DiesAfter(2))
    (path,) = tmp_path.rglob("setup.json")
    found = json.loads(path.read_text())
    assert found["micro_batch_rows"] == 3
    path.write_text(json.dumps(found | {"micro_batch_rows": 2}))
    assert produce(store, box).facts["micro_batch_rows"] == 2


def test_frozen_weights_are_those_of_the_start_and_the_rest_is_not(base: Path, tmp_path: Path) -> None:
    """Kills patterns that the recipe states and the run forgets."""
    from transformers import AutoModelForCausalLM

    adapter = ModelSpec(adapter=Full(), freeze=["layers.0", "embed_tokens"])
    made = produce(Store(tmp_path), stage(base, adapter=adapter))
    start, tuned = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (base, made.path / "model"))
    same = {name for name in start if torch.equal(start[name], tuned[name])}
    assert same == {name for name in start if "layers.0." in name or "embed_tokens" in name or "lm_head" in name}
    assert made.facts["num_trained_weights"] < sum(value.numel() for value in start.values()) / 2
    assert made.key != stage(base, adapter=ModelSpec(adapter=Full())).key


def test_another_optimizer_trains_and_resumes_as_the_recipe_says(base: Path, tmp_path: Path) -> None:
    """Kills an optimizer that the stage never hears of, and momentum lost with the process."""
    optimizer = {"module": "torch.optim:SGD", "args": {"momentum": 0.9}}
    groups = [{"match": "lora_B", "learning_rate": 2.0}]
    changes = {"optimizer": optimizer, "learning_rate": 1.0, "groups": groups}
    whole = produce(Store(tmp_path / "a"), stage(base, changes=changes))
    with pytest.raises(Killed):
        produce(Store(tmp_path / "b"), stage(base, changes=changes), DiesAfter(3))
    resumed = produce(Store(tmp_path / "b"), stage(base, changes=changes))
    assert digests(resumed.path / "model") == digests(whole.path / "model")
    assert whole.key != stage(base).key


class Notes(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_regularisers_of_the_recipe_reach_the_model_and_their_cost_is_said(base: Path, tmp_path: Path) -> None:
    """Kills a setting that is read and never put on the model, and a second model in memory that nobody was told of."""
    notes, store = Notes(), Store(tmp_path)
    whole = ModelSpec(adapter=Full())
    plain = produce(store, stage(base, adapter=whole))
    changes = {"dropout": 0.5, "kl": Kl(weight=0.5)}
    held = produce(store, stage(base, adapter=whole, changes=changes), notes)
    assert json.loads((held.path / "model" / "config.json").read_text())["attention_dropout"] == 0.5
    first = [tables.read_table(made.file("steps.parquet"), tables.STEPS).to_pylist()[0] for made in (plain, held)]
    assert abs(first[0]["loss_sum"] - first[1]["loss_sum"]) > 1e-3 and first[1]["kl"] > 0 and first[0]["kl"] is None
    assert any("attention_dropout" in note for note in notes.said)
    assert any("starting model is kept beside the trained one" in note for note in notes.said)

"""Weights from a recipe to the batches that training takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from small_recipe import write_small
from tutelage import load_recipe, run
from tutelage.pipeline import open_batches
from tutelage.tables import PLANNED, read_dropped, read_table


def test_record_weights_and_normalising_reach_the_batches(tmp_path: Path) -> None:
    """Kills a weight that is read and then lost, and a gate that stops the run for records which the data itself leaves out."""
    recipe = write_small(tmp_path)
    sums = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text().splitlines()]
    quality = [(i % 5) / 2 for i in range(len(sums))]
    rows = [json.dumps({**row, "quality": q}) + "\n" for row, q in zip(sums, quality, strict=True)]
    (tmp_path / "sums.jsonl").write_text("".join(rows))
    overrides = ["sources.sums.weight_field=quality", "loss={response: {normalise: task}}", "sources.words.weight=2"]
    done = run(load_recipe(recipe, overrides=overrides), until="audit", store=tmp_path / "store", runs=tmp_path / "runs")
    plan = done.artefacts["plan"]
    silent = {d.row for d in read_dropped(plan.file("dropped.parquet")) if (d.source, d.reason) == ("sums", "no_loss_weight")}
    assert silent <= set(range(0, len(sums), 5))
    assert silent
    planned = read_table(plan.file("planned.parquet"), PLANNED).to_pylist()
    words = {line["multiplier"] for line in planned if line["task"] == "words"}
    assert len(words) == 1
    per_weight = {line["multiplier"] / quality[line["row"]] for line in planned if line["task"] == "sums"}
    assert max(per_weight) == pytest.approx(min(per_weight))
    shards = {label: a for label, a in done.artefacts.items() if label.split(" ")[0] in ("render", "rerender")}
    plain = dict.fromkeys(plan.facts["tasks"], 0.0)
    for batch in open_batches({**shards, "plan": plan}):
        for document in batch.documents:
            line, slots = planned[document.example], slice(document.start, document.start + document.length)
            own = 2.0 if line["task"] == "words" else quality[line["row"]]
            plain[line["task"]] += float(batch.weights[document.row, slots].sum(dtype=np.float64)) / own
    assert plain["sums"] == pytest.approx(plain["words"], rel=1e-6)

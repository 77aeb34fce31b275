"""Exported rows in other trainers: the loss of the first steps, theirs beside ours, and what happens without isolation.

    python benchmarks/export.py              # the bundled 135M model in float32, eight minutes of CPU
    python benchmarks/export.py --quick      # a random Llama of its vocabulary instead, under a minute
    python benchmarks/export.py --check      # fails when a loss differs, or when the control without isolation does not
    python benchmarks/export.py --json FILE

    recipes/first.yaml, less of it --plan--> our loss and gradient, step by step -------------------\
                                   --export--> TRL, transformers (README's code run), axolotl's collator --> equal?

Each peer runs in its own environment below `.peers`, made once. Nothing learns (learning rate 0), so the second step counts too.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from peer_environments import make_peer, python_of  # noqa: E402

RECIPE = HERE.parent / "recipes" / "first.yaml"
OVERRIDES = ["name=export", "render.max_tokens=256", "mix.total_tokens=4000", "batch.slots_per_step=1024", "train.dtype=float32"]
NUM_STEPS = 2
LOSS_BAR, NORM_BAR, LEAK_BAR = 1e-5, 1e-4, 1e-4
"""Relative differences: of losses and gradient norms at most, of a leaking control at least."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--store", type=Path, help="a store that may hold the bundled model already")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = measure(Path(place), store=asked.store or Path(place) / "store", quick=asked.quick)
    lines, faults = compare(found)
    print("\n".join(lines))
    if asked.json:
        asked.json.write_text(json.dumps(found | {"faults": faults}, indent=1))
    if asked.check and faults:
        sys.exit("\n".join(faults))


def measure(place: Path, *, store: Path, quick: bool) -> dict[str, Any]:
    """Ours, and every peer's that has an environment."""
    import tutelage
    from tutelage.exporting import Wanted, export_recipe

    overrides = [*OVERRIDES, f"model.name={prepare_model(place, store, quick=quick)}"]
    file = tutelage.load_recipe(RECIPE, overrides=overrides)
    rows = {}
    for to in ("trl", "transformers", "axolotl"):
        rows[to] = export_recipe(file, place / to, Wanted(to), store=store, runs=place / "runs")
    found: dict[str, Any] = {"quick": quick, "ours": our_steps(file, store, place), "rows_per_step": rows["trl"].rows_per_step}
    if problem := make_peer("trl"):
        found["trl_problem"] = problem
    else:
        found["trl"] = in_peer("trl", "export_trl.py", trl_cases(rows), place)
    if problem := make_peer("axolotl"):
        found["axolotl_problem"] = problem
    else:
        job = {"code": rows["axolotl"].how_to_train, "model": file.model_name, "rows_per_step": rows["axolotl"].rows_per_step}
        found["axolotl"] = in_peer("axolotl", "export_axolotl.py", job | {"pad_token": "<|im_end|>"}, place)
        found["axolotl"]["same_rows"] = found["axolotl"].pop("rows") == exported_rows(place / "axolotl")
    return found


def prepare_model(place: Path, store: Path, *, quick: bool) -> Path:
    """A model folder in float32: the bundled one, or a random Llama that shares its tokenizer."""
    import tutelage
    from tutelage.model.stage import model_folder

    done = tutelage.run(tutelage.load_recipe(RECIPE, overrides=OVERRIDES), until="plan", store=store, runs=place / "runs")
    bundled = model_folder(done.artefacts["model"]).resolve()
    if not quick:
        return bundled
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = AutoConfig.from_pretrained(bundled, **shape, head_dim=16)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # at the usual start attention hardly matters, and a leak would hardly show
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.mul_(5.0)
    model.save_pretrained(place / "model")
    AutoTokenizer.from_pretrained(bundled).save_pretrained(place / "model")
    return place / "model"


def our_steps(file: Any, store: Path, place: Path) -> dict[str, list[float]]:
    """Loss and gradient norm of the first steps as our trainer computes them."""
    import numpy as np
    import torch

    import tutelage
    from tutelage.evaluate.stage import open_shards
    from tutelage.model import load_model
    from tutelage.train.step import step_gradients

    torch.set_num_threads(2)
    done = tutelage.run(file, until="plan", store=store, runs=place / "runs")
    batches = tutelage.Batches(done.artefacts["plan"].path, open_shards(done.artefacts))
    model = load_model(file.model_name)
    losses, norms = [], []
    for step in range(NUM_STEPS):
        model.zero_grad()
        flat, nll = step_gradients(model, batches[step])
        losses.append(float((flat.weights.astype(np.float64) * nll).sum() / batches[step].total_weight))
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
    return {"losses": losses, "grad_norms": norms}


def trl_cases(rows: dict[str, Any]) -> dict[str, Any]:
    """TRL and a plain Trainer on the same rows: all in one pass, a row a pass, documents permuted, isolation taken away."""
    per_step = rows["trl"].rows_per_step
    trl = {"code": rows["trl"].how_to_train, "num_steps": NUM_STEPS}
    plain = {"code": rows["transformers"].how_to_train, "num_steps": NUM_STEPS}
    whole, single = {"batch": per_step, "accumulation": 1}, {"batch": 1, "accumulation": per_step}
    return {
        "trl, rows in one pass": trl | whole,
        "trl, one row a pass": trl | single,
        "trl, documents permuted": trl | whole | {"change": "permuted"},
        "transformers, rows in one pass": plain | whole,
        "transformers, one row a pass": plain | single,
        "control: trl without seq_lengths": trl | whole | {"change": "leaking"},
    }


def in_peer(peer: str, script: str, job: Any, place: Path) -> Any:
    """What a script says that runs in a peer's environment, with no network and caches of its own."""
    import os

    job_path, result = place / f"{peer}.job.json", place / f"{peer}.result.json"
    job_path.write_text(json.dumps(job))
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hf"), "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    command = [str(python_of(peer)), str(HERE / script), str(job_path), str(result)]
    done = subprocess.run(command, cwd=place, env=os.environ | offline, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{peer} failed:\n{done.stderr[-3000:]}")
    return json.loads(result.read_text())


def exported_rows(folder: Path) -> list[list[list[int]]]:
    """The rows as they lie on disk, without `datasets`."""
    import pyarrow as pa

    tables = [pa.ipc.open_stream(path).read_all() for path in sorted(folder.glob("data-*.arrow"))]
    return [[row["input_ids"], row["labels"], row["position_ids"]] for row in pa.concat_tables(tables).to_pylist()]


def compare(found: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What to print, and what is wrong."""
    ours, lines, faults = found["ours"], [], []
    lines.append(f"{'ours':<36} losses {_numbers(ours['losses'])}  gradient norms {_numbers(ours['grad_norms'])}")
    for name, case in found.get("trl", {"cases": {}})["cases"].items():
        worst = _difference(case["losses"], ours["losses"])
        norm = _difference(case["grad_norms"], ours["grad_norms"])
        note = f"{case['attention']} {case['dtype']}"
        lines.append(f"{name:<36} losses {_numbers(case['losses'])}  off by {worst:.1e}, gradient norm {norm:.1e}  ({note})")
        if name.startswith("control"):
            faults += [] if worst > LEAK_BAR else [f"{name}: the loss should have moved by {LEAK_BAR:g}, it moved by {worst:.1e}"]
        elif not (worst <= LOSS_BAR and norm <= NORM_BAR):
            faults.append(f"{name}: loss off by {worst:.1e} (at most {LOSS_BAR:g}), gradient norm by {norm:.1e} ({NORM_BAR:g})")
    if "axolotl" in found:
        losses = found["axolotl"]["losses"]
        worst, leak = (_difference([losses[mask]], ours["losses"][:1]) for mask in ("dropped", "kept"))
        lines.append(
            f"{'axolotl, its collator':<36} loss {losses['dropped']:.6f}  off by {worst:.1e}  ({found['axolotl']['collator']})"
        )
        lines.append(f"{'control: axolotl without flash':<36} loss {losses['kept']:.6f}  off by {leak:.1e}")
        faults += [] if worst <= LOSS_BAR else [f"axolotl's collator: loss off by {worst:.1e} (at most {LOSS_BAR:g})"]
        faults += [] if leak > LEAK_BAR else [f"axolotl with its mask kept should leak, but the loss moved by {leak:.1e} only"]
        faults += [] if found["axolotl"]["same_rows"] else ["axolotl's preparation changed or reordered the rows"]
    for name in ("trl", "axolotl"):
        if name in found:
            lines.append(f"{name}'s environment: " + ", ".join(f"{k} {v}" for k, v in found[name]["versions"].items()))
        else:
            lines.append(f"{name}: {found[f'{name}_problem']}")
            faults.append(f"{name} has no environment: {found[f'{name}_problem']}")
    return lines, faults


def _numbers(values: list[float]) -> str:
    return re.sub(r"[\[\]]", "", ", ".join(f"{value:.6f}" for value in values))


def _difference(values: list[float], right: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(values, right, strict=True))


if __name__ == "__main__":
    main()

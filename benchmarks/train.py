r"""Training on the same conversations: tutelage beside TRL (padded, grouped by length, packed) and a loop written by hand.

    python benchmarks/train.py --rounds 1    # SmolLM2-135M, bf16 weights and optimizer states, steps of 4 x 2,048 slots
    python benchmarks/train.py --quick       # a random small Llama, under a minute once TRL's environment is there
    python benchmarks/train.py --check       # speed, ceiling, curve and memory of the loss; fails when a bar is missed
    python benchmarks/train.py --device cuda --shape llama-1b --sides tutelage trl-packed liger unsloth-packed ceiling

    conversations --tutelage's plan--> the first steps' documents --> every side, in a process of its own, in turns
                                   \--> a few later documents -----> the same measure of every trained model

Every side gets the same token ids and the same trained tokens, which is checked, takes as many steps, and is measured on the
same held-out tokens by the same plain code in float32. Packed sides take rows of 2,048; padded and grouped ones take 8 documents
a forward pass (`trl-grouped@4` takes 4) and about as many documents a step as ours holds. Imports, loading, compiling, a short
warm-up and, of several steps, the first stand outside the clocks. Memory is the process's own high-water mark; `tutelage-small`
takes passes of 768 tokens, and stands beside those peers that need less memory than our usual passes.

    --precision bf16       weights, gradients and optimizer states in bfloat16 on every side (ours: a benchmark's construction,
                               as the library keeps float32 weights behind narrow ones)
    --precision masters    float32 weights and states, arithmetic in bfloat16: autocast there, a rounded copy here
    --precision defaults   everybody's own: TRL's SFTConfig as it comes, our recipe as it comes (LoRA): not the same work

Only operations that are executed count: linear layers, attention per document, the head where something is learned.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from peer_environments import ON_A_GPU, make_peer, python_of  # noqa: E402
from peer_meter import machine, num_cores  # noqa: E402
from train_bars import Bar, ceiling_bar, curve_bar, of, same_targets, speed_bars, spread  # noqa: E402

DEMONSTRATION = str(HERE.parent / "recipes" / "data" / "*.jsonl*")
SIDES = ("tutelage", "tutelage-small", "ceiling", "trl-packed", "trl-grouped@2", "trl-grouped", "trl-padded", "plain")
PEER_OF = {"trl": "trl", "liger": "liger", "unsloth": "unsloth"}
"""The environment of a side, by its first word; the others run in ours."""
MODULES = {"trl": "peer_train_trl", "liger": "peer_train_plain", "plain": "peer_train_plain", "unsloth": "peer_train_unsloth"}
PARTS = ("speed", "curve", "memory")


def main() -> int:
    options = read_options()
    if options.side:
        run_side(options.side, Path(options.folder))
        return 0
    result: dict[str, Any] = {"machine": machine(), "options": vars(options), "runs": [], "missing": {}}
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="train-") as folder:
        if {"speed", "curve"} & set(options.parts):
            measure_all(options, Path(folder), result)
        if "memory" in options.parts:
            result["memory"] = measure_memory(options)
    return report(result, options)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training on the same conversations: tutelage beside its peers.")
    parser.add_argument("--data", metavar="GLOB", nargs="+", default=[DEMONSTRATION], help="JSONL files of any shape")
    parser.add_argument("--shape", choices=["smollm2-135m", "llama-small", "llama-1b", "tiny"], help="the model (smollm2-135m)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--adapter", choices=["full", "lora"], default="full")
    parser.add_argument("--precision", choices=["bf16", "masters", "float32", "defaults"], default="bf16")
    parser.add_argument("--sides", nargs="+", metavar="SIDE", help="of tutelage, ceiling, plain, trl-*, liger, unsloth-*")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="speed alone; all with --check")
    parser.add_argument("--steps", type=int, help="optimizer steps of each side, the first of several not in its rate (2)")
    parser.add_argument("--curve-steps", type=int, default=4, help="of the comparison with float32 (4)")
    parser.add_argument("--rows", type=int, help="rows of a step (4)")
    parser.add_argument("--capacity", type=int, help="slots of a row (2048)")
    parser.add_argument("--rounds", type=int, help="measurements of each side, in turns (3)")
    parser.add_argument("--attention", default="sdpa", help="the peers' attention: sdpa, or flash_attention_2 with CUDA")
    parser.add_argument("--store", type=Path, help="a store that may hold the bundled model and the rendered data already")
    parser.add_argument("--quick", action="store_true", help="under a minute: a tiny model and few tokens; judges equal targets")
    parser.add_argument("--json", metavar="FILE", help="writes everything that was measured")
    parser.add_argument("--check", action="store_true", help="exit code 1 when a bar is missed (with --quick: equal targets)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    defaults = {"shape": "tiny", "rows": 2, "capacity": 256, "rounds": 1, "steps": 1} if options.quick else {}
    defaults = {"shape": "smollm2-135m", "rows": 4, "capacity": 2048, "rounds": 3, "steps": 2} | defaults
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.parts = options.parts or (list(PARTS) if options.check and not options.quick else ["speed"])
    usual = (
        [side for side in SIDES if side not in ("trl-padded", "trl-grouped@2", "tutelage-small")]
        if options.quick
        else list(SIDES)
    )
    options.sides = options.sides or (["tutelage", "trl-default"] if options.precision == "defaults" else usual)
    return options


# ---- measuring, each in a process of its own


def measure_all(options: argparse.Namespace, folder: Path, result: dict[str, Any]) -> None:
    """Fills `runs`, and `curves` where asked for."""
    job = prepare_job(options, folder)
    result["tokens"] = {"documents": sum(len(row) for step in job["rows"] for row in step), "held_out": len(job["held_out"])}
    if "speed" in options.parts:
        sides = available(options.sides, result["missing"], device=options.device)
        what = f"{options.shape}, {options.precision}, {options.adapter}"
        print(f"\n{what}: {options.steps} steps of {options.rows} x {options.capacity}", flush=True)
        result["runs"] = [measure(side, number, job, folder) for number in range(options.rounds) for side in sides]
    if "curve" in options.parts:
        result["curves"] = measure_curves(options, folder)


def available(sides: list[str], missing: dict[str, str], *, device: str) -> list[str]:
    """The sides whose environment can be made; of the others `missing` says why not."""
    for peer in {PEER_OF[family(side)] for side in sides if family(side) in PEER_OF}:
        problem = "needs a CUDA device: --device cuda" if peer in ON_A_GPU and device == "cpu" else make_peer(peer)
        if problem:
            missing[peer] = problem
    return [side for side in sides if PEER_OF.get(family(side)) not in missing]


def family(side: str) -> str:
    """`trl` of `trl-grouped@4`."""
    return side.partition("@")[0].partition("-")[0]


def prepare_job(options: argparse.Namespace, folder: Path, **changes: Any) -> dict[str, Any]:
    """What every side is told. The plan is made here, once; our own side finds it in the store."""
    from train_data import BUNDLED, make_shape, write_recipe, write_steps

    said = {name: getattr(options, name) for name in ("steps", "rows", "capacity")} | changes
    store = Path(options.store or folder / "store").resolve()
    model = BUNDLED
    if options.shape != "smollm2-135m":
        plain = write_recipe(folder / "bundled", data=options.data, model=BUNDLED, capacity=256, rows=4, adapter="full")
        bundled = write_steps(plain, store=store, num_steps=0)["model"]
        place = folder / options.shape
        model = str(place if place.exists() else make_shape(options.shape, place, bundled=Path(bundled)))
    where = folder / f"recipe {said['rows']} {said['capacity']}"
    shape = {"capacity": said["capacity"], "rows": said["rows"], "adapter": options.adapter}
    shape["adapter"] = "lora" if options.precision == "defaults" else options.adapter
    recipe = write_recipe(where, data=options.data, model=model, **shape)
    made = write_steps(recipe, store=store, num_steps=said["steps"])
    job = made | {"tokenizer": made["model"], "recipe": str(recipe), "store": str(store), "steps": said["steps"]}
    job |= {"capacity": said["capacity"], "rows_per_step": said["rows"], "learning_rate": 2e-5, "weight_decay": 0.01}
    job |= {name: getattr(options, name) for name in ("device", "precision", "attention", "adapter")}
    return job | {"threads": num_cores(), "compiles": options.device == "cpu" and not options.quick}


def measure(side: str, number: int, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One side's result, from a process of its own."""
    from train_data import write_job

    place = folder / f"{side} {number} {job['precision']} {job['steps']}"
    write_job(place, job | {"measures_before": number == 0})
    peer = PEER_OF.get(family(side))
    python = [str(python_of(peer)), "-I"] if peer else [sys.executable]
    command = [*python, str(Path(__file__).resolve()), "--side", side, "--folder", str(place)]
    quiet = {"HF_HOME": str(place / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    quiet |= {"OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    quiet |= {"CUDA_VISIBLE_DEVICES": ""} if job["device"] == "cpu" else {}
    with (place / "printed.txt").open("w") as printed:
        code = subprocess.run(command, env=os.environ | quiet, stdout=printed, stderr=printed, cwd=place, check=False).returncode
    if code:
        lines = (place / "printed.txt").read_text(errors="replace").strip().splitlines()
        if side == "tutelage" or family(side) in ("ceiling", "trl", "tutelage"):
            raise SystemExit(f"{side} failed:\n" + "\n".join(lines[-60:]))
        print(f"  {side:16}failed: {lines[-1][:200] if lines else code}", flush=True)
        return {"side": side, "round": number, "problem": "\n".join(lines[-40:])}
    result = {"side": side, "round": number, **json.loads((place / "result.json").read_text())}
    print(f"  {side:16}{one_line(result)}", flush=True)
    return result


def one_line(run: dict[str, Any]) -> str:
    if "useful_per_second" not in run:
        return f"{run['flops_per_second'] / 1e9:8,.0f} GFLOP/s"
    return (
        f"{run['useful_per_second']:8,.1f} useful tokens/s {run['supervised_per_second']:8,.1f} supervised "
        f"{run['peak_bytes'] / 1e9:6.2f} GB  held-out loss {run['held_out_loss']:.4f}"
    )


def run_side(side: str, folder: Path) -> None:
    """What a measuring process does: writes result.json."""
    import torch
    from train_side import Job

    job = Job(folder)
    torch.set_num_threads(job.said["threads"])
    torch.manual_seed(0)
    name, _, rows = side.partition("@")
    first, _, setting = name.partition("-")
    module = import_module(MODULES.get(first, "peer_train_tutelage"))
    if first == "ceiling":
        result = module.ceiling(job)
    else:
        setting = {"plain": "padded", "liger": "liger"}.get(first, setting)
        result = module.train(job, setting, int(rows) if rows else None)
    versions = {package: metadata.version(package) for package in module.VERSIONS} | {"python": platform.python_version()}
    (folder / "result.json").write_text(json.dumps(result | {"versions": versions, "precision": job.precision}))


def measure_curves(options: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Our step losses on the same batches, in bfloat16, in float32, and in bfloat16 with each step's rows the other way round."""
    print(f"\nlosses of {options.curve_steps} steps", flush=True)
    curves = {}
    for name, side, precision in (
        ("float32", "tutelage", "float32"),
        ("bfloat16", "tutelage", "masters"),
        ("permuted", "tutelage-permuted", "masters"),
    ):
        job = prepare_job(options, folder, steps=options.curve_steps) | {"precision": precision}
        curves[name] = measure(side, 0, job, folder)["losses"]
    return curves


def measure_memory(options: argparse.Namespace) -> dict[str, Any]:
    """What `train_memory.py` finds: the peak of the loss step for small and large vocabularies."""
    command = [sys.executable, str(HERE / "train_memory.py"), "--device", options.device, "--check"]
    command += ["--quick"] if options.quick else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print("\n" + done.stdout.strip(), flush=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"train_memory.py failed:\n{done.stderr[-2000:]}")
    return {"is_met": done.returncode == 0, "said": (done.stdout.strip().splitlines() or [""])[-1]}


# ---- reporting


def report(result: dict[str, Any], options: argparse.Namespace) -> int:
    """Prints what was measured, the bars last, and returns the exit code."""
    runs = result["runs"]
    if runs:
        print_table(runs)
    for peer, why in result["missing"].items():
        print(f"{peer}: not installed: {why}")
    bars = same_targets(runs)
    if not options.quick and options.precision != "defaults":
        bars += speed_bars(runs) + ceiling_bar(runs)
    bars += curve_bar(result.get("curves", {}))
    if "memory" in result:
        bars.append(Bar("memory of the loss step", 0.0, result["memory"]["said"], result["memory"]["is_met"]))
    result["bars"] = [vars(bar) for bar in bars]
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1, default=str))
    print()
    for bar in bars:
        print(f"{'met   ' if bar.is_met else 'MISSED'} {bar.what}: {bar.said}")
    return int(options.check and not all(bar.is_met for bar in bars))


def print_table(runs: list[dict[str, Any]]) -> None:
    """Medians by side, with the range where there are rounds."""
    print(f"\n{'':18}{'useful/s':>22}{'supervised/s':>22}{'peak GB':>16}{'held-out loss':>16}")
    for side in dict.fromkeys(run["side"] for run in runs):
        if not (useful := of(runs, side, "useful_per_second")):
            continue
        columns = [spread(useful, ",.1f"), spread(of(runs, side, "supervised_per_second"), ",.1f")]
        columns.append(spread([value / 1e9 for value in of(runs, side, "peak_bytes")]))
        losses = spread(of(runs, side, "held_out_loss"), ".4f")
        print(f"{side:18}{columns[0]:>22}{columns[1]:>22}{columns[2]:>16}{losses:>16}")
    for run in (run for run in runs if run["round"] == 0 and "versions" in run):
        states = "; ".join(f"{name} {'/'.join(kinds)}" for name, kinds in run.get("states", {}).items())
        print(f"{run['side']}: {', '.join(f'{k} {v}' for k, v in run['versions'].items())}{'; ' if states else ''}{states}")
    if waits := of(runs, "tutelage", "warm_up_seconds"):
        print(f"tutelage's layers were ready {spread(waits, '.1f')} s after loading, compilation included where it compiles")
    if before := of(runs, "ceiling", "held_out_before"):
        print(f"held-out loss before training: {before[0]:.4f}")


if __name__ == "__main__":
    sys.exit(main())

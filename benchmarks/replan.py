"""A prepared set planned anew: other rates, another schedule, another loss, until the first training batch.

    python benchmarks/replan.py             # a million examples of five tasks, three rounds
    python benchmarks/replan.py --quick     # under a minute: 100,000 examples, one round
    python benchmarks/replan.py --check     # exit code 1 when a change takes more than a second per million examples

The set is prepared once (read, rendered, tallied, planned). Then each change is a process of its own: its clock starts with
everything imported and the compiled loops loaded, and stops with the first batch in memory: ids, targets, weights, positions.

    rates       temperature 2 becomes temperature 5
    schedule    the rates move from proportional to equal
    loss        answers only becomes answers and instructions
    again       nothing has changed
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from peer_meter import machine  # noqa: E402

DEMONSTRATION = HERE.parent / "recipes" / "data"
TASKS = 5
WARM = "warm"
"""A small set, planned before the clock starts: it loads the compiled loops."""
BAR = 1.0
"""Seconds per million examples."""
TEMPERED = {"kind": "temperature", "temperature": 2}
CHANGES: dict[str, dict[str, Any]] = {
    "rates": {"mix": {"rates": {"kind": "temperature", "temperature": 5}, "max_visits": 3}},
    "schedule": {"mix": {"schedule": {"kind": "interpolate", "from": TEMPERED, "to": "equal"}, "max_visits": 3}},
    "loss": {"loss": "instruction_modelling"},
    "again": {},
}
"""Sections of the recipe that a change replaces."""


def main() -> int:
    options = read_options()
    if options.change:
        print(json.dumps(measure(Path(options.folder), options.change)))
        return 0
    found: dict[str, Any] = {"machine": machine(), "examples": options.examples, "seconds": {}}
    print(", ".join(f"{name} {value}" for name, value in found["machine"].items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="replan-") as folder:
        started = time.perf_counter()
        made = prepare(Path(folder), options.examples)
        print(f"prepared in {time.perf_counter() - started:.1f} s: {made}", flush=True)
        for change in CHANGES:
            found["seconds"][change] = [run_change(Path(folder), change, number) for number in range(options.rounds)]
    return report(found, options)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A prepared set planned anew, until the first training batch.")
    parser.add_argument("--examples", type=int, help="how many (1,000,000; quick 100,000)")
    parser.add_argument("--rounds", type=int, help="measurements of each change (3; quick 1)")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", metavar="FILE", help="writes everything that was measured")
    parser.add_argument("--check", action="store_true", help="exit code 1 when the bar is missed")
    parser.add_argument("--change", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.examples = options.examples or (100_000 if options.quick else 1_000_000)
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def prepare(folder: Path, examples: int) -> str:
    """Five sources, each the demonstration's conversations again and again with a number, planned once."""
    import yaml
    from peer_data import write_million, write_sets

    import tutelage

    files = write_sets([str(DEMONSTRATION / "*.jsonl*")], folder / "data", rows=None)["single-turn"]["files"].values()
    sizes = [examples * share // 31 for share in (16, 8, 4, 2, 1)]
    for number, size in enumerate(sizes):
        write_million(files, folder / f"task{number}.jsonl", rows=size)
    recipe = {
        "name": "replan",
        "sources": {f"task{n}": {"path": f"task{n}.jsonl", "licence": "any", "task": f"task{n}"} for n in range(TASKS)},
        "curate": {"rules": [], "near_duplicates": None, "exact_duplicates": "keep"},
        "split": {"held_out_share": 0},
        "render": {"max_tokens": 1024},
        "mix": {"rates": TEMPERED, "max_visits": 3},
        "batch": {"slots_per_step": 16384, "capacity": 2048},
        "audit": {"enabled": False},
    }
    for change, sections in CHANGES.items():
        (folder / f"{change}.yaml").write_text(yaml.safe_dump(recipe | sections))
    write_million(files, folder / "warm.jsonl", rows=5_000)
    (folder / f"{WARM}.yaml").write_text(yaml.safe_dump(recipe | {"sources": {WARM: {"path": "warm.jsonl", "licence": "any"}}}))
    tutelage.run(tutelage.load_recipe(folder / f"{WARM}.yaml"), until="plan", store=folder / "store", runs=folder / "runs")
    done = tutelage.run(tutelage.load_recipe(folder / "again.yaml"), until="plan", store=folder / "store", runs=folder / "runs")
    return f"{done.artefacts['plan'].facts['total']['available_examples']:,} examples"


def run_change(folder: Path, change: str, number: int) -> dict[str, float]:
    """One change in a process of its own; each round plans with another seed, so that none finds the plan of the one before."""
    os.sync()  # what was written before is not to be waited for
    command = [sys.executable, str(Path(__file__).resolve()), "--change", f"{change} {number}", "--folder", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise SystemExit(made.stderr)
    result: dict[str, float] = json.loads(made.stdout.splitlines()[-1])
    print(f"  {change:10}{result['seconds']:7.2f} s ({result['cpu_seconds']:.2f} s of CPU)", flush=True)
    return result


def measure(folder: Path, change: str) -> dict[str, float]:
    """Seconds from the recipe to the first batch."""
    from peer_tutelage import import_all

    import_all()
    import tutelage
    from tutelage.evaluate.stage import open_shards
    from tutelage.plan.batch import Batches

    def first_batch(recipe: str, seed: list[str]) -> tuple[Any, Any]:
        file = tutelage.load_recipe(folder / f"{recipe}.yaml", overrides=seed)
        done = tutelage.run(file, until="plan", store=folder / "store", runs=folder / "runs").artefacts
        return done, Batches(done["plan"].path, open_shards(done))[0]

    name, number = change.split()
    first_batch(WARM, [f"mix.seed={os.getpid()}"])
    wall, cpu = time.perf_counter(), time.process_time()
    done, batch = first_batch(name, [f"mix.seed={int(number) + 1}"] if CHANGES[name] else [])
    spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    assert batch.total_weight > 0, "the first batch trains something"
    assert done["plan"].is_hit == (not CHANGES[name]), "a change is planned anew, and nothing else is"
    assert all(each.is_hit for label, each in done.items() if label != "plan"), "nothing but the plan is made again"
    return spent


def report(found: dict[str, Any], options: argparse.Namespace) -> int:
    """Prints what was measured, the bar last, and returns the exit code."""
    scale = 1e6 / found["examples"]
    worst = 0.0
    print(f"\n{'until the first batch':24}{'s per million':>14}{'(range)':>16}")
    for change, runs in found["seconds"].items():
        seconds = [run["seconds"] * scale for run in runs]
        worst = max(worst, median(seconds))
        print(f"{change:24}{median(seconds):14.2f}{f'({min(seconds):.2f}-{max(seconds):.2f})':>16}")
    found["worst"] = worst
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))
    judged = not options.quick  # with few examples what is done once weighs most
    is_met = worst < BAR or not judged
    print(f"{'met   ' if is_met else 'MISSED'} the slowest change: {worst:.2f} s per million examples; bar {BAR}")
    return int(options.check and not is_met)


if __name__ == "__main__":
    sys.exit(main())

"""Ten million examples of fifty tasks planned: rates, order, packing. And the packing alone beside TRL, axolotl, LLaMA-Factory.

    python benchmarks/plan.py             # 10 M examples at 2,048 and 8,192 slots per row, three rounds, peers on 1 M
    python benchmarks/plan.py --quick     # under a minute: 1 M examples, one round, TRL alone on 50,000
    python benchmarks/plan.py --check     # exit code 1 below a bar
    python benchmarks/plan.py --data "sft/*.jsonl.zst" --check

Lengths are those of the demonstration's conversations in the bundled tokenizer's tokens, with its template; `--data` takes
other files. A task draws its lengths from one file; sizes are log-uniform over three decades; temperature 2, at most 3
visits, 1.3 passes, 8 rows per step. Every measurement is a process of its own, and the sides take turns. Its clock starts
with the lengths in memory and the compiled loops loaded, and stops with every visit placed; imports stand outside.

    plan          make_plan: counts, order, windows of 100 steps, rows. Shares are of examples, or (plan/tokens) of tokens
    first batch   the same on 1 M examples, and the placements of the first step
    pack          the packing alone, in the order given: ours, and the peers' packers with their defaults
    ranks         the rows of steps of 64 shared between 8 ranks
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from peer_environments import PACKAGES, make_peer, python_of  # noqa: E402
from peer_meter import machine  # noqa: E402

DEMONSTRATION = HERE.parent / "recipes" / "data" / "*.jsonl*"
CAPACITIES = (2048, 8192)
EFFICIENCY_BARS = {2048: 0.995, 8192: 0.999}
SHARE_BAR = 0.02
"""How far the share of a task may be from the promised one in any window of 100 steps."""
SECONDS_BAR, BYTES_BAR, FIRST_BAR = 60.0, 4e9, 1.0
PEERS = tuple(PACKAGES)
PACKERS = ("ours", *PEERS)

Run = dict[str, Any]
Bar = tuple[str, str, bool]


def main() -> int:
    options = read_options()
    if options.side:
        run_side(options.side, Path(options.folder))
        return 0
    wanted = () if options.alone else ("trl",) if options.quick else PEERS
    missing = {peer: make_peer(peer) for peer in wanted}
    result: dict[str, Any] = {"machine": machine(), "options": vars(options), "missing": missing}
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        result["runs"] = measure_all(options, [peer for peer in missing if not missing[peer]], Path(folder))
    return report(result, options)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Rates, order and packing of millions of examples: tutelage beside its peers.")
    parser.add_argument("--data", metavar="GLOB", nargs="+", help="JSONL files whose lengths are taken (the demonstration)")
    parser.add_argument("--examples", type=int, help="how many are planned (10 M; quick 1 M)")
    parser.add_argument("--peer-examples", type=int, help="how many the packers get (1 M; quick 50,000)")
    parser.add_argument("--tasks", type=int, default=50, help="how many tasks they are of (50)")
    parser.add_argument("--rounds", type=int, help="measurements per side (3; quick 1)")
    parser.add_argument("--alone", action="store_true", help="without the peers")
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer examples, one round, TRL alone")
    parser.add_argument("--json", metavar="FILE", help="writes everything that was measured")
    parser.add_argument(
        "--check", action="store_true", help="exit code 1 below a bar (with --quick memory and the first batch are not judged)"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.data = options.data or [str(DEMONSTRATION)]
    options.examples = options.examples or (1_000_000 if options.quick else 10_000_000)
    options.peer_examples = options.peer_examples or (50_000 if options.quick else 1_000_000)
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


# ---- measuring, each in a process of its own


def measure_all(options: argparse.Namespace, peers: list[str], folder: Path) -> list[Run]:
    """Every run, told as it ends; a step's weight, real tokens and examples come with those of ours."""
    from plan_lengths import measure_lengths, write_set

    pools = measure_lengths(options.data)
    print("; ".join(f"{name}: {len(pool):,} of {pool.mean():.0f} tokens" for name, pool in pools.items()), flush=True)
    runs = []
    for capacity in CAPACITIES:
        made = folder / str(capacity)
        write_set(pools, made, num_examples=options.examples, num_tasks=options.tasks, capacity=capacity)
        job = {"set": str(made), "capacity": capacity, "num_examples": options.examples}
        first = {**job, "num_examples": min(options.examples, 1_000_000)}
        few = {**job, "num_examples": min(options.examples, options.peer_examples)}
        sides = [("plan", job), ("first batch", first), *((f"pack {name}", few) for name in ("ours", *peers))]
        for number in range(options.rounds):
            runs += [measure(side, number, said) for side, said in sides]
        runs += [measure("plan/tokens", 0, job), measure("ranks", 0, first)]
    return runs


def measure(side: str, number: int, job: dict[str, Any]) -> Run:
    """One measurement, with the problem that it met instead where it met one."""
    folder = Path(job["set"]) / f"{side} {number}".replace("/", " of ")
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(job))
    name = side.rpartition(" ")[2]
    python = [str(python_of(name)), "-I"] if name in PEERS else [sys.executable]
    command = [*python, str(Path(__file__).resolve()), "--side", side, "--folder", str(folder)]
    quiet = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **quiet})
    run: Run = {"side": side, "capacity": job["capacity"], "num_examples": job["num_examples"]}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no word"]
        run["problem"] = lines[-1][:300]
    else:
        run |= json.loads((folder / "result.json").read_text())
    said = run.get("problem") or ", ".join(f"{key} {shown(key, run[key])}" for key in SHOWN if key in run)
    print(f"{side} at {job['capacity']:,}, {job['num_examples']:,} examples: {said}", flush=True)
    return run


def run_side(side: str, folder: Path) -> None:
    """In the process of one measurement: the job in `folder` done, its result written beside it."""
    import peer_packers

    job = json.loads((folder / "job.json").read_text())
    kind, _, name = side.partition(" ")
    if kind == "pack":
        result = peer_packers.pack(name, job, folder)
    else:
        import plan_ours

        result = plan_ours.SIDES[side](job)
    (folder / "result.json").write_text(json.dumps(result))


# ---- reporting

SHOWN = ("seconds", "cpu_seconds", "peak_bytes", "efficiency", "worst_share", "num_visits", "num_rows", "imbalance", "in_order")


def shown(key: str, value: float) -> str:
    if key in ("efficiency", "worst_share"):
        return f"{value:.3%}"
    if key == "peak_bytes":
        return f"{value / 1e6:,.0f} MB"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def report(result: dict[str, Any], options: argparse.Namespace) -> int:
    """Prints the tables, then the bars, and returns the exit code."""
    by_side: dict[tuple[str, int], list[Run]] = {}
    for run in result["runs"]:
        by_side.setdefault((run["side"], run["capacity"]), []).append(run)
    result["ratios"] = {}
    for capacity in CAPACITIES:
        print(f"\n{capacity:,} slots per row")
        print(f"{'':18}{'examples':>12}{'seconds':>9}{'(range)':>16}{'CPU s':>8}{'peak MB':>9}{'filled':>9}{'rows':>11}")
        for (side, at), runs in by_side.items():
            if at == capacity:
                print_line(side, runs)
        result["ratios"][capacity] = print_ratios(by_side, capacity)
    for peer, why in result["missing"].items():
        print(f"{peer}: not installed: {why}" if why else f"{peer}: {', '.join(PACKAGES[peer])}")
    bars = [bar for capacity in CAPACITIES for bar in all_bars(by_side, capacity, is_quick=options.quick)]
    result["bars"] = [dict(zip(("what", "said", "is_met"), bar, strict=True)) for bar in bars]
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1))
    print()
    for what, said, is_met in bars:
        print(f"{'met   ' if is_met else 'MISSED'} {what}: {said}")
    return int(options.check and not all(is_met for _, _, is_met in bars))


def print_line(side: str, runs: list[Run]) -> None:
    if "problem" in runs[0]:
        print(f"{side:18}failed: {runs[0]['problem']}")
        return
    if "seconds" not in runs[0]:
        print(f"{side:18}{runs[0]['said']}")
        return
    seconds = [run["seconds"] for run in runs]
    spread = f"({min(seconds):.2f}-{max(seconds):.2f})" if len(runs) > 1 else "(once)"
    line = f"{side:18}{runs[0]['num_examples']:12,}{median(seconds):9.2f}{spread:>16}"
    line += f"{median(run['cpu_seconds'] for run in runs):8.2f}{max(run['peak_bytes'] for run in runs) / 1e6:9,.0f}"
    print(line + f"{runs[0]['efficiency']:9.3%}{runs[0]['num_rows']:11,}")


def print_ratios(by_side: dict[tuple[str, int], list[Run]], capacity: int) -> dict[str, list[float]]:
    """Each peer's seconds over ours on the same lengths: the ratio of the medians, the least and the most of the rounds."""
    ours, found = [run["seconds"] for run in by_side["pack ours", capacity]], {}
    for peer in PEERS:
        runs = by_side.get((f"pack {peer}", capacity), [{"problem": ""}])
        if "problem" in runs[0]:
            continue
        theirs = [run["seconds"] for run in runs]
        rounds = sorted(b / a for a, b in zip(ours, theirs, strict=True))
        found[peer] = [median(theirs) / median(ours), rounds[0], rounds[-1]]
        print(f"{peer}'s seconds over ours: {found[peer][0]:.1f} (rounds {rounds[0]:.1f} to {rounds[-1]:.1f})")
    return found


def all_bars(by_side: dict[tuple[str, int], list[Run]], capacity: int, *, is_quick: bool) -> list[Bar]:
    plans, tokens = by_side["plan", capacity], by_side["plan/tokens", capacity]
    if any("problem" in run for run in (*plans, *tokens)):
        return [(f"{capacity:,}: the plan", "failed", False)]
    least, bar = min(run["efficiency"] for run in (*plans, *tokens)), EFFICIENCY_BARS[capacity]
    bars = [(f"{capacity:,}: filled", f"{least:.3%}; bar {bar:.1%}", least >= bar)]
    for unit, runs in (("examples", plans), ("tokens", tokens)):
        worst = max(run["worst_share"] for run in runs)
        said = f"{worst:.2%} from the promised share at worst, {runs[0]['num_windows']:,} windows; bar {SHARE_BAR:.0%}"
        bars.append((f"{capacity:,}: shares of {unit}", said, worst <= SHARE_BAR))
    first = median(run["seconds"] / run["num_examples"] * 1e6 for run in by_side["first batch", capacity])
    if not is_quick:
        bars.append((f"{capacity:,}: first batch", f"{first:.2f} s per million; bar {FIRST_BAR:.0f} s", first < FIRST_BAR))
        most = max(run["peak_bytes"] for run in (*plans, *tokens))
        bars.append((f"{capacity:,}: memory", f"{most / 1e9:.2f} GB; bar {BYTES_BAR / 1e9:.0f} GB", most < BYTES_BAR))
    slowest = max(run["seconds"] for run in plans)
    said = (
        f"{slowest:.1f} s for {plans[0]['num_visits']:,} visits of {plans[0]['num_examples']:,} examples; bar {SECONDS_BAR:.0f} s"
    )
    return [*bars, (f"{capacity:,}: time", said, slowest < SECONDS_BAR)]


if __name__ == "__main__":
    sys.exit(main())

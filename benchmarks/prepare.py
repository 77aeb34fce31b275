"""Preparation of the same conversations, from JSONL to tokens on disk: tutelage beside TRL, axolotl and LLaMA-Factory.

    python benchmarks/prepare.py             # the demonstration's conversations with SmolLM2's tokenizer, three rounds
    python benchmarks/prepare.py --quick     # under a minute, once TRL's environment is there
    python benchmarks/prepare.py --check     # fails below a bar, or when the sides do not come to the same tokens
    python benchmarks/prepare.py --data "sft/*.jsonl.zst" "chat/*.jsonl.zst" --tokenizers FOLDER --check

    conversations.jsonl --run(until="render"), then "plan"----------> documents --\
                        --SFTTrainer's preparation, empty caches----> documents ---> equal ids, equal trained tokens?
                        --axolotl's and LLaMA-Factory's preparation-> documents --/

Every measurement is a process of its own, and the sides take turns. Both sides read the same files through the same chat
template, which has the `{% generation %}` marks that TRL needs; that its texts are those of the tokenizer's own is checked.
The clock runs from opening the JSONL to the last file on disk. Imports, compiled loops too, loading a peer's tokenizer and making
its trainer stand outside, as do copying the model and the tokenizer into our store. The side `tutelage` opens its tokenizer
and proves its engine after the clock has started; `opened` has its tokenizer open before, as the peers have theirs: it is judged.

    rendered     read and render here; tokens and trained marks there (TRL without the packing, which is timed apart)
    packed       all the way to packed rows on disk; axolotl packs later, while it trains
    floor        `tokenizers.encode_batch_fast` on ready texts, and nothing else
    one-by-one   ours in one process with its two threads one after the other: what the tokenizer itself takes

Peers have no counterpart of cleaning and held-out split: both are off, but for one measurement named `curated`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from hashlib import md5
from importlib import import_module, metadata
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from peer_environments import PACKAGES, make_peer, python_of  # noqa: E402
from peer_meter import machine, num_cores, tree_bytes  # noqa: E402

DEMONSTRATION = HERE.parent / "recipes" / "data" / "*.jsonl*"
CAPACITY = 2048
BARS = {"qwen3": 25.0, "llama3": 25.0, "smollm2": 3.5}
"""Rendered rows per second over TRL's, tokenizers open on both sides, with the engine that `auto` chooses."""
OUTSIDE_BAR = 1.5
"""Seconds per 100,000 conversations that may pass outside the tokenizer, on all cores."""
MILLION_BAR = 1e9
OURS, PEER = ("tutelage", "opened", "tokenizers", "one-by-one", "curated", "floor", "million"), tuple(PACKAGES)
IN_TURNS = ("tutelage", "opened", "trl", "tokenizers", "floor", "one-by-one")
MULTI_TURN = ("tutelage", "trl")
COMPARED = {"seconds": "seconds", "packed_seconds": "packed_seconds", "cpu_seconds": "cpu_seconds"}
"""Our clocks, and those of a peer that they are set against."""
NUMBERED = ("seconds", "cpu_seconds", "packed_seconds", "packed_cpu_seconds", "peak_bytes", "packing_efficiency", "num_tokens")


def main() -> int:
    options = read_options()
    if options.side:
        run_side(options.side, Path(options.folder))
        return 0
    missing = {peer: make_peer(peer) for peer in (("trl",) if options.quick else PEER)}
    if missing["trl"]:
        raise SystemExit(f"TRL cannot be installed: {missing['trl']}")
    result: dict[str, Any] = {"machine": machine(), "options": vars(options), "missing": missing}
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="prepare-") as folder:
        result["sets"] = measure_all(options, missing, Path(folder))
    return report(result, options)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Preparation of the same conversations: tutelage beside its peers.")
    parser.add_argument("--data", metavar="GLOB", nargs="+", help="JSONL files of any shape, .gz and .zst too")
    parser.add_argument(
        "--rows", type=int, help="conversations of each kind; 0 takes all (all of --data; else 20,000; quick 3,000)"
    )
    parser.add_argument("--tokenizers", metavar="FOLDER", help="with qwen3, llama3, smollm2 in it (else SmolLM2's alone)")
    parser.add_argument("--only", metavar="NAME", nargs="+", help="of those tokenizers, these")
    parser.add_argument("--rounds", type=int, help="measurements per side (3; quick 2)")
    parser.add_argument("--peer-rows", type=int, default=10_000, help="conversations that axolotl and LLaMA-Factory get (10,000)")
    parser.add_argument("--processes", type=int, default=num_cores(), help="of each peer (one per core)")
    parser.add_argument("--million", action="store_true", help="a million records in one process, for its memory")
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer rows and rounds, TRL alone")
    parser.add_argument("--json", metavar="FILE", help="writes everything that was measured")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit code 1 below a bar (brings --million; with --quick only equal tokens are judged)",
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rows is None:
        options.rows = 3_000 if options.quick else 0 if options.data else 20_000
    options.data = options.data or [str(DEMONSTRATION)]
    options.rounds = options.rounds or (2 if options.quick else 3)
    options.million |= options.check and not options.quick
    return options


# ---- measuring, each in a process of its own


def measure_all(options: argparse.Namespace, missing: dict[str, str], folder: Path) -> list[dict[str, Any]]:
    """What was measured, by tokenizer and kind of conversation."""
    from peer_data import write_models, write_sets
    from peer_tutelage import warm_store

    data = write_sets(options.data, folder / "data", rows=options.rows or None)
    # axolotl takes seconds for every file, so it gets one
    few = write_sets(options.data, folder / "few", rows=min(options.peer_rows, data["single-turn"]["rows"]), in_one=True)
    print("; ".join(f"{kind}: {said['rows']:,} conversations, {said['bytes'] / 1e6:.1f} MB" for kind, said in data.items()))
    made = []
    for name, model in write_models(options.tokenizers, folder / "models", only=options.only).items():
        more = {"model": str(model), "store": str(warm_store(model, folder / f"warm {name}"))}
        more |= {"processes": options.processes, "capacity": CAPACITY}
        for kind, said in data.items():
            job = {**said, **more, "folder": str(folder / f"{name} {kind}")}
            made.append({"tokenizer": name, "kind": kind, **measure_set(job, kind, options)})
        if not options.quick:
            job = {**few["single-turn"], **more, "folder": str(folder / f"{name} few")}
            peers = [peer for peer in ("axolotl", "llamafactory") if not missing[peer]]
            made.append({"tokenizer": name, "kind": "single-turn, fewer", **measure_few(job, peers)})
    if options.million:
        job = {**data["single-turn"], **more, "folder": str(folder / "million"), "num_million": 1_000_000}
        made.append({"tokenizer": name, "kind": "million", "rows": 1_000_000, "runs": [measure("million", 0, job)]})
    return made


def measure_set(job: dict[str, Any], kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Our sides and TRL, in turns; of the multi-turn conversations one round, as they are few."""
    print(f"\n{Path(job['folder']).name}", flush=True)
    sides = IN_TURNS if kind == "single-turn" else MULTI_TURN
    num_rounds = options.rounds if kind == "single-turn" else 1
    runs = [measure(side, n, job) for n in range(num_rounds) for side in sides]
    if kind == "single-turn" and not options.quick and Path(job["model"]).name == "smollm2":
        runs.append(measure("curated", 0, job))
    return {"rows": job["rows"], "bytes": job["bytes"], "runs": runs, "documents": {"trl": compare(job, "trl")}}


def measure_few(job: dict[str, Any], peers: list[str]) -> dict[str, Any]:
    """The slower peers, once each, on fewer conversations, and ours on the same ones."""
    print(f"\n{Path(job['folder']).name}", flush=True)
    runs = [measure(side, 0, job) for side in ("tutelage", *peers)]
    documents = {run["side"]: compare(job, run["side"]) for run in runs[1:] if "problem" not in run}
    return {"rows": job["rows"], "bytes": job["bytes"], "runs": runs, "documents": documents}


def measure(side: str, number: int, job: dict[str, Any]) -> dict[str, Any]:
    """One measurement. Memory is looked at ten times a second, until the clock of the measured process stops."""
    folder = Path(job["folder"]) / f"{side} {number}"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(job | {"lists_documents": number == 0}))
    python = [str(python_of(side)), "-I"] if side in PEER else [sys.executable]
    command = [*python, str(Path(__file__).resolve()), "--side", side, "--folder", str(folder)]
    quiet = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    quiet |= {"AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "true"}
    peak = 0
    os.sync()  # what the side before wrote is not to be waited for
    with (folder / "printed.txt").open("w") as printed:
        process = subprocess.Popen(command, env=os.environ | quiet, stdout=printed, stderr=printed, cwd=folder)
        while process.poll() is None:
            if not (folder / "result.json").exists():
                peak = max(peak, tree_bytes(process.pid))
            time.sleep(0.1)
    result = told(side, process.returncode, peak, job, folder)
    for made in folder.iterdir():  # what a side prepared would fill the memory that the next one takes
        if made.name not in ("documents.txt", "printed.txt"):
            shutil.rmtree(made) if made.is_dir() else made.unlink()
    return result


def told(side: str, code: int, peak: int, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The result of a measurement; a peer that fails is told of, but TRL and we ourselves must not fail."""
    if code:
        lines = (folder / "printed.txt").read_text(errors="replace").strip().splitlines()
        if side in ("axolotl", "llamafactory"):
            print(f"  {side:13}failed: {lines[-1][:200]}", flush=True)
            return {"side": side, "problem": lines[-1][:500], "printed": "\n".join(lines[-40:])}
        raise SystemExit(f"{side} failed:\n" + "\n".join(lines[-60:]))
    result = {"side": side, "peak_bytes": peak, **json.loads((folder / "result.json").read_text())}
    rows = job.get("num_million") if side == "million" else job["rows"]
    print(f"  {side:13}{rows / result['seconds']:9,.0f} rows/s{result['seconds']:8.2f} s", flush=True)
    return result


def run_side(side: str, folder: Path) -> None:
    """What a measuring process does: writes result.json, and in the first round two digests per document."""
    job = json.loads((folder / "job.json").read_text())
    module = import_module(f"peer_{side}" if side in PEER else "peer_tutelage")
    if side in ("floor", "million"):
        result, documents = getattr(module, side)(job, folder)
    else:
        result, documents = module.prepare(job, folder, **({} if side in PEER else module.SIDES[side]))
    versions = {name: metadata.version(name) for name in module.VERSIONS} | {"python": platform.python_version()}
    written = folder / "result.tmp"
    written.write_text(json.dumps(result | {"versions": versions}))
    written.rename(folder / "result.json")
    if job["lists_documents"]:
        lines = (f"{md5(ids).hexdigest()} {md5(trained).hexdigest()}\n" for ids, trained in documents)
        (folder / "documents.txt").write_text("".join(lines))


def compare(job: dict[str, Any], peer: str) -> dict[str, int]:
    """How many documents of both sides are the same, as multisets: each side packs them in an order of its own."""
    ours, theirs = ((Path(job["folder"]) / f"{side} 0" / "documents.txt").read_text().splitlines() for side in ("tutelage", peer))
    same_ids = Counter(line.split()[0] for line in ours) & Counter(line.split()[0] for line in theirs)
    same = Counter(ours) & Counter(theirs)
    return {"ours": len(ours), "theirs": len(theirs), "same_ids": same_ids.total(), "same_trained": same.total()}


# ---- reporting


def report(result: dict[str, Any], options: argparse.Namespace) -> int:
    """Prints what was measured, the bars last, and returns the exit code."""
    bars: list[tuple[str, float, str, bool]] = []
    for measured in result["sets"]:
        by_side: dict[str, list[dict[str, Any]]] = {}
        for run in measured["runs"]:
            by_side.setdefault(run["side"], []).append(run)
        print(f"\n{measured['tokenizer']}, {measured['kind']}: {measured['rows']:,} conversations")
        if measured["kind"] == "million":
            bars.append(report_million(by_side["million"][0]))
            continue
        print_table(measured, by_side)
        measured["ratios"] = ratios = {side: all_ratios(by_side, side) for side in by_side if "problem" not in by_side[side][0]}
        for peer in measured["documents"]:
            found = documents_bar(measured, by_side, peer)
            bars += [found] if peer == "trl" else []  # the others' templates are their own: told, not judged
            print(f"{found[0]}: {found[2]}")
        for side in (side for side in ("tutelage", "opened", "tokenizers", "axolotl", "llamafactory") if side in ratios):
            print_ratios(side, ratios[side])
        if measured["kind"] == "single-turn":
            costs = [*speed_bars(measured), print_outside(measured, by_side)]
            bars += [] if options.quick else costs  # on few rows what is done once weighs most
    for peer, why in result["missing"].items():
        print(f"{peer}: not installed: {why}" if why else f"{peer}: {versions_of(result, peer)}")
    print(f"tutelage: {versions_of(result, 'tutelage')}\n")
    result["bars"] = [dict(zip(("what", "value", "said", "is_met"), bar, strict=True)) for bar in bars]
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1))
    for what, _, said, is_met in bars:
        print(f"{'met   ' if is_met else 'MISSED'} {what}: {said}")
    return int(options.check and not all(bar[-1] for bar in bars))


def versions_of(result: dict[str, Any], side: str) -> str:
    runs = [run for each in result["sets"] for run in each["runs"] if run["side"] == side]
    known = next((run["versions"] for run in runs if "versions" in run), None)
    return ", ".join(f"{name} {number}" for name, number in known.items()) if known else "did not run"


def print_table(measured: dict[str, Any], by_side: dict[str, list[dict[str, Any]]]) -> None:
    print(f"{'':13}{'rows/s':>9}{'(range)':>17}{'tokens/s':>12}{'CPU s':>8}{'peak MB':>9}{'packed rows/s':>15}{'filled':>9}")
    for side, runs in by_side.items():
        if "problem" in runs[0]:
            print(f"{side:13}failed: {runs[0]['problem']}")
            continue
        m = {name: median(run[name] for run in runs) for name in NUMBERED if name in runs[0]}
        speeds = [measured["rows"] / run["seconds"] for run in runs]
        spread = f"({min(speeds):,.0f}-{max(speeds):,.0f})" if len(speeds) > 1 else "(once)"
        line = f"{side:13}{measured['rows'] / m['seconds']:9,.0f}{spread:>17}{m['num_tokens'] / m['seconds']:12,.0f}"
        line += f"{m['cpu_seconds']:8.1f}{m['peak_bytes'] / 1e6:9,.0f}"
        line += f"{measured['rows'] / m['packed_seconds']:15,.0f}" if "packed_seconds" in m else f"{'-':>15}"
        print(line + (f"{m['packing_efficiency']:9.2%}" if "packing_efficiency" in m else f"{'-':>9}"))
    ours = by_side["tutelage"]
    stages = {name: median(run["stages"][name] for run in ours) for name in ours[0]["stages"]}
    print(f"engine: {', '.join(ours[0]['engine_name'])}; opened and proved in {median_of(ours, 'opening'):.2f} s")
    print("seconds: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in stages.items()))


def median_of(runs: list[dict[str, Any]], clock: str, unit: str = "seconds") -> float:
    return median(run[clock][unit] for run in runs)


def all_ratios(by_side: dict[str, list[dict[str, Any]]], side: str) -> dict[str, list[float]]:
    """TRL's (or the peer's) seconds over this side's: the ratio of the medians, and of the rounds the least and the most."""
    peer, ours = ("trl", side) if "trl" in by_side else (side, "tutelage")
    found = {}
    for name, theirs in COMPARED.items():
        if peer != ours and name in by_side[ours][0] and theirs in by_side[peer][0]:
            a, b = [run[name] for run in by_side[ours]], [run[theirs] for run in by_side[peer]]
            rounds = sorted(y / x for x, y in zip(a, b, strict=False))
            found[name] = [median(b) / median(a), rounds[0], rounds[-1]]
    return found


def print_ratios(side: str, ratios: dict[str, list[float]]) -> None:
    names = {"seconds": "rendered", "packed_seconds": "packed", "cpu_seconds": "rendered per CPU second"}
    said = [f"{names[name]} {value:.1f} ({low:.1f}-{high:.1f})" for name, (value, low, high) in ratios.items()]
    if said:
        over = f"tutelage's rows/s over {side}'s" if side in PEER else f"{side}'s rows/s over TRL's"
        print(f"{over}: {', '.join(said)}")


def documents_bar(measured: dict[str, Any], by_side: dict[str, list[dict[str, Any]]], peer: str) -> tuple[str, float, str, bool]:
    """The bar of equal tokens: each of our documents is one of the peer's, and what it has more we set aside with a reason."""
    same, dropped = measured["documents"][peer], by_side["tutelage"][0]["dropped"]
    others = by_side["floor"][0]["num_other_texts"] if "floor" in by_side else 0
    said = f"{same['ours']:,} documents, {same['theirs']:,} from {peer} (we set aside: {dropped or 'nothing'}); "
    said += f"{same['same_ids']:,} have equal ids, {same['same_trained']:,} equal trained tokens too"
    said += f"; {others:,} texts differ from the tokenizer's own template" if "floor" in by_side else ""
    is_all = same["same_trained"] == same["ours"] and same["theirs"] - same["ours"] == sum(dropped.values()) and not others
    what = f"{measured['tokenizer']}, {measured['kind']}: equal tokens"
    return f"{what} ({peer})", same["same_trained"], said, is_all


def speed_bars(measured: dict[str, Any]) -> list[tuple[str, float, str, bool]]:
    name = measured["tokenizer"]
    value, low, high = measured["ratios"]["opened"]["seconds"]
    said = f"{value:.2f} times (rounds {low:.2f} to {high:.2f}); bar {BARS[name]}"
    return [(f"{name}: rows/s over TRL's, both tokenizers open", value, said, value >= BARS[name])]


def print_outside(measured: dict[str, Any], by_side: dict[str, list[dict[str, Any]]]) -> tuple[str, float, str, bool]:
    """The bar of what passes outside the tokenizer: the time on all cores without the encoder's own, shared by the cores."""
    scale = 100_000 / measured["rows"]
    parts = {"whole": median(run["seconds"] for run in by_side["opened"]) * scale}
    parts["engine"] = median_of(by_side["one-by-one"], "engine", "cpu_seconds") * scale
    parts["outside"] = parts["whole"] - parts["engine"] / num_cores()
    alone = by_side["one-by-one"]
    others = median_of(alone, "engine") + median_of(alone, "opening")
    parts["one process"] = (median(run["seconds"] for run in alone) - others) * scale
    measured["outside"] = parts
    said = f"{parts['outside']:.2f} s per 100,000 conversations ({parts['whole']:.2f} s on {num_cores()} cores, of which "
    said += f"the encoder has {parts['engine']:.2f} s of a core); bar {OUTSIDE_BAR}; "
    said += f"{parts['one process']:.2f} s in one process with nothing beside it"
    return f"{measured['tokenizer']}: outside the tokenizer", parts["outside"], said, parts["outside"] < OUTSIDE_BAR


def report_million(run: dict[str, Any]) -> tuple[str, float, str, bool]:
    peak = run["own_peak_bytes"]
    said = f"{peak / 1e6:,.0f} MB at most in {run['seconds']:.1f} s; bar {MILLION_BAR / 1e6:,.0f} MB; {run['counts']}"
    return "read and render a million records", peak, said, peak < MILLION_BAR


if __name__ == "__main__":
    sys.exit(main())

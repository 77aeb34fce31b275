"""Preparation of the same conversations, from JSONL to packed rows on disk: tutelage beside TRL.

    python benchmarks/prepare.py             # 20,000 conversations, three rounds
    python benchmarks/prepare.py --quick     # under a minute, once TRL's environment is there
    python benchmarks/prepare.py --check     # fails below the bar, or when the sides do not come to the same tokens

    conversations.jsonl --run(until="plan"), empty store----------> documents --\
                        --SFTTrainer's preparation, empty caches--> documents ---> equal ids, equal trained tokens?

Every measurement is a process of its own, and the sides take turns. Seconds run from opening the JSONL to the last file on
disk; imports and the making of the trainer are left out. TRL gets a process per core, `assistant_only_loss` and bfd packing,
in an environment of its own below `.peers`. It has no counterpart of cleaning and held-out split: both are off in the
comparison, and one measurement with the demonstration's rules, exact and near duplicates is printed as `curated`.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import md5
from importlib import import_module, util
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = HERE / ".peers"
PEER = (["torch==2.13.0"], ["trl==1.16.0", "datasets==5.2.0", "transformers==5.23.0"])
"""Installed one after the other: with torch first and alone, pip does not choose another build of it."""
DEMONSTRATION = HERE.parent / "recipes" / "data" / "*.jsonl*"
CAPACITY = 2048
BAR = 3.5
"""Rows per second over TRL's, with SmolLM2's tokenizer, for which no faster exact engine is known."""
SIDES = ("tutelage", "trl")
OURS = ("tutelage", "tokenizers", "numpy", "pyarrow")
THEIRS = ("trl", "transformers", "datasets", "tokenizers", "torch", "numpy", "pyarrow")
RULES = ["strip_boilerplate", {"length": {"max_response_words": 600}}, {"repetition": {"max_share": 0.3}}, "refusal"]
PLAIN = {"rules": [], "near_duplicates": None, "exact_duplicates": "keep"}
CURATED = {"rules": RULES, "near_duplicates": {"threshold": 0.8}}
UNMARKED = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
MARKED = (
    "{{'<|im_start|>' + message['role'] + '\n'}}{% set text = message['content'] + '<|im_end|>' %}{% if message['role'] == "
    "'assistant' %}{% generation %}{{ text }}{% endgeneration %}{% else %}{{ text }}{% endif %}{{ '\n' }}"
)
"""What TRL needs and SmolLM2's template lacks: marks around what the assistant writes. The text stays the same."""


def main() -> int:
    options = read_options()
    if options.side:
        run_side(options.side, Path(options.folder))
        return 0
    make_peer()
    result: dict[str, Any] = {"machine": machine(), "options": vars(options)}
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    with tempfile.TemporaryDirectory(prefix="prepare-") as folder:
        job = make_job(options, Path(folder))
        result["runs"] = [measure(side, n, job) for n in range(options.rounds) for side in SIDES]
        result["runs"].append(measure("curated", 0, job))
        result["documents"] = compare(Path(folder))
    return report(result, options)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Preparation of the same conversations: tutelage beside TRL.")
    parser.add_argument("--data", metavar="GLOB", default=str(DEMONSTRATION), help="JSONL files of any shape, .gz too")
    parser.add_argument("--rows", type=int, help="conversations; fewer are repeated with suffixes (20,000; quick 3,000)")
    parser.add_argument("--model", metavar="FOLDER_OR_NAME", default="bundled:smollm2-135m", help="tokenizer and template")
    parser.add_argument("--rounds", type=int, help="measurements per side (3; quick 2)")
    parser.add_argument("--processes", type=int, default=num_cores(), help="of TRL (one per core)")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", metavar="FILE", help="writes everything that was measured")
    parser.add_argument("--check", action="store_true", help=f"exit code 1 below {BAR} times TRL's rows/s")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.rows = options.rows or (3_000 if options.quick else 20_000)
    options.rounds = options.rounds or (2 if options.quick else 3)
    return options


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": cpu, "cores": num_cores(), "GiB": round(memory), "system": platform.platform(), "load": os.getloadavg()[0]}


def make_peer() -> None:
    folder, wanted = PEERS / "trl", json.dumps(PEER)
    if (folder / "installed").is_file() and (folder / "installed").read_text() == wanted:
        return
    print(f"making TRL's environment in {folder}, once: 1.5 GB, some minutes", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for packages in PEER:
        subprocess.run([str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *packages], check=True)
    (folder / "installed").write_text(wanted)


# ---- the job


def make_job(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What every measuring process is told; the conversations lie in `folder`, one `{"messages": [...]}` per line."""
    file, tokenizer = folder / "conversations.jsonl", tokenizer_folder(options.model)
    turns = islice(conversations(options.data), options.rows)
    file.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns), encoding="utf-8")
    print(f"{options.rows:,} conversations, {file.stat().st_size / 1e6:.1f} MB; {options.model}; {CAPACITY:,} slots a row\n")
    return {"file": str(file), "tokenizer": str(tokenizer), "rows": options.rows, "processes": options.processes}


def tokenizer_folder(name: str) -> Path:
    """A folder with the model's tokenizer and stand-in weights: preparation needs no weights, but tutelage hashes them."""
    import numpy as np
    from safetensors.numpy import save_file

    from tutelage.model.names import materialise, resolve
    from tutelage.model.stage import TOKENIZER_FILES

    target = PEERS / "tokenizers" / "".join(c if c.isalnum() else "-" for c in name)
    with tempfile.TemporaryDirectory() as folder:
        if not (target / "model.safetensors").is_file():
            whole = materialise(resolve(name), Path(folder))
            target.mkdir(parents=True, exist_ok=True)
            for path in (whole / file for file in TOKENIZER_FILES):
                if path.is_file():
                    shutil.copyfile(path, target / path.name)
            save_file({"stand_in": np.zeros(1, np.float32)}, target / "model.safetensors")
    return target


def conversations(pattern: str) -> Iterator[list[dict[str, str]]]:
    """The records of the files in one mixed order, over and over; from the second time on messages end in " (2)", " (3)", ..."""
    first = [turns for path in sorted(glob.glob(pattern)) for turns in plain_turns(Path(path))]
    if not first:
        raise SystemExit(f"--data {pattern}: no conversations there; give a glob of JSONL files")
    random.Random(0).shuffle(first)
    for lap in count(1):
        for turns in first:
            yield [{**turn, "content": f"{turn['content']} ({lap})"} for turn in turns] if lap > 1 else turns


def plain_turns(path: Path) -> Iterator[list[dict[str, str]]]:
    """The conversations of one file that are text alone; malformed records and those with tools are left out."""
    from tutelage.sources.detect import choose, shape_named, spread
    from tutelage.sources.reasons import Malformed

    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="\n") as file:
        records = [json.loads(line) for line in file if line.strip()]
    shape = shape_named(choose(spread(records)).name, None)
    for record in records:
        try:
            turns, tools = shape(record)
        except Malformed:
            continue
        if tools is None and all(not any(rest) for _, _, *rest in turns):
            yield [{"role": role, "content": content} for role, content, *_ in turns]


# ---- measuring, each in a process of its own


def measure(side: str, number: int, job: dict[str, Any]) -> dict[str, Any]:
    """One measurement; `process_seconds` counts the interpreter's start, imports and the listing of documents too."""
    folder = Path(job["file"]).with_name(f"{side} {number}")
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(job | {"lists_documents": number == 0}))
    python = [str(PEERS / "trl/bin/python"), "-I"] if side == "trl" else [sys.executable]
    command = [*python, str(Path(__file__).resolve()), "--side", side, "--folder", str(folder)]
    caches = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result = {"side": side, "process_seconds": time.perf_counter() - started, **json.loads((folder / "result.json").read_text())}
    result["rows_per_second"] = job["rows"] / result["seconds"]
    print(f"  {side:9}{result['rows_per_second']:9,.0f} rows/s{result['seconds']:8.2f} s", flush=True)
    return result


def run_side(side: str, folder: Path) -> None:
    """What a measuring process does: writes result.json, and in the first round two digests per document."""
    job = json.loads((folder / "job.json").read_text())
    if side == "trl":
        result, documents = prepare_with_trl(job, folder)
    else:
        result, documents = prepare_with_tutelage(job, folder, PLAIN if side == "tutelage" else CURATED)
    versions = {name: import_module(name).__version__ for name in (THEIRS if side == "trl" else OURS)}
    (folder / "result.json").write_text(json.dumps(result | {"versions": versions | {"python": platform.python_version()}}))
    if job["lists_documents"]:
        lines = (f"{md5(ids).hexdigest()} {md5(trained).hexdigest()}\n" for ids, trained in documents)
        (folder / "documents.txt").write_text("".join(lines))


class Meter:
    """Adds up the wall and CPU seconds of `with` blocks, those of finished child processes included."""

    def __init__(self) -> None:
        self.spent = {"seconds": 0.0, "cpu_seconds": 0.0}

    def __enter__(self) -> Meter:
        self.start = self.now()
        return self

    def __exit__(self, *_: object) -> None:
        for name, value in self.now().items():
            self.spent[name] += value - self.start[name]
        self.peak_bytes = peak_bytes()

    def now(self) -> dict[str, float]:
        return {"seconds": time.perf_counter(), "cpu_seconds": sum(sum(os.times()[i : i + 2]) for i in (0, 2))}

    def result(self, num_tokens: int, num_rows: int) -> dict[str, Any]:
        efficiency = num_tokens / (num_rows * CAPACITY)
        return {**self.spent, "peak_bytes": self.peak_bytes, "num_tokens": num_tokens, "packing_efficiency": efficiency}


def peak_bytes() -> int:
    """Peak resident memory of the largest process; /proc goes first, as ru_maxrss starts with the parent's size."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    known = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return 1024 * max(own if known is None else known, children)


Documents = Iterator[tuple[bytes, bytes]]
"""Of every document as training gets it: its ids, and of each token but the first whether it is trained."""


def prepare_with_tutelage(job: dict[str, Any], folder: Path, curate: dict[str, Any]) -> tuple[dict[str, Any], Documents]:
    import yaml

    import tutelage.pipeline
    from tutelage.evaluate.stage import open_shards
    from tutelage.plan.batch import Batches
    from tutelage.tables import read_table

    for name in ("numba", "pandas"):  # else imported on the way, where they are there; TRL has imported all by then
        if util.find_spec(name):
            import_module(name)
    recipe = {"name": "prepare", "model": {"name": job["tokenizer"]}, "sources": {"all": {"path": job["file"]}}, "curate": curate}
    recipe |= {"split": {"held_out_share": 0}, "render": {"max_tokens": CAPACITY, "overlong": "drop"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with Meter() as meter:
        file = tutelage.load_recipe(folder / "recipe.yaml")
        run = tutelage.run(file, until="plan", store=folder / "store", runs=folder / "runs")
    plan = run.artefacts["plan"]
    num_rows = len(set(read_table(plan.file("placements.parquet"))["row"].to_pylist()))  # without the last step's empty rows
    result = meter.result(plan.facts["real_tokens"], num_rows)
    result["stages"] = {label: artefact.manifest["seconds"] for label, artefact in run.artefacts.items()}
    result["dropped"] = plan.manifest["counts"]["dropped"]
    return result, planned_documents(Batches(plan.path, open_shards(run.artefacts)))


def planned_documents(batches: Iterable[Any]) -> Documents:
    for batch in batches:
        for at in batch.documents:
            own = at.row - batch.documents[0].row, slice(at.start, at.start + at.length)
            yield batch.inputs[own].tobytes(), (batch.weights[own][:-1] > 0).tobytes()


def prepare_with_trl(job: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Documents]:
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    meter, tokenizer = Meter(), AutoTokenizer.from_pretrained(job["tokenizer"])
    tokenizer.chat_template = tokenizer.chat_template.replace(UNMARKED, MARKED)

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            with meter:
                return super()._prepare_dataset(*args, **kwargs)

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **small))
    how = {"packing": True, "packing_strategy": "bfd", "max_length": CAPACITY, "assistant_only_loss": True}
    how |= {"dataset_num_proc": job["processes"] if job["processes"] > 1 else None}
    args = SFTConfig(**how, report_to="none", use_cpu=True, bf16=False, output_dir=str(folder / "out"))
    with meter:
        dataset = load_dataset("json", data_files=job["file"], split="train")
    made = Timed(model=model, args=args, train_dataset=dataset, processing_class=tokenizer).train_dataset
    return meter.result(sum(sum(lengths) for lengths in made["seq_lengths"]), len(made)), packed_documents(made)


def packed_documents(dataset: Any) -> Documents:
    import numpy as np

    for row in dataset.with_format("numpy"):
        ids, labels, first = row["input_ids"].astype(np.int32), row["labels"], 0
        for length in row["seq_lengths"].tolist():
            yield ids[first : first + length].tobytes(), (labels[first + 1 : first + length] != -100).tobytes()
            first += length


# ---- comparing and reporting


def compare(folder: Path) -> dict[str, int]:
    """How many documents of both sides are the same, as multisets: each side packs them in an order of its own."""
    ours, theirs = ((folder / f"{side} 0" / "documents.txt").read_text().splitlines() for side in SIDES)
    same_ids = Counter(line.split()[0] for line in ours) & Counter(line.split()[0] for line in theirs)
    same = Counter(ours) & Counter(theirs)
    return {"tutelage": len(ours), "trl": len(theirs), "same_ids": same_ids.total(), "same_trained": same.total()}


def report(result: dict[str, Any], options: argparse.Namespace) -> int:
    """Prints what was measured, the ratio last, and returns the exit code."""
    by_side = {side: [run for run in result["runs"] if run["side"] == side] for side in (*SIDES, "curated")}
    print(f"\n{'':11}{'rows/s':>9}{'(range)':>17}{'tokens/s':>11}{'CPU s':>8}{'peak MB':>9}{'packed':>9}{'process s':>11}")
    print("\n".join(table_line(side, runs) for side, runs in by_side.items()))
    for side in ("tutelage", "curated"):
        stages = {name: median(run["stages"][name] for run in by_side[side]) for name in by_side[side][0]["stages"]}
        spent = ", ".join(f"{name} {seconds:.2f}" for name, seconds in stages.items())
        print(f"{side}'s seconds: {spent}; set aside: {by_side[side][0]['dropped'] or 'nothing'}")
    for side in SIDES:
        print(f"{side}'s versions: " + ", ".join(f"{name} {number}" for name, number in by_side[side][0]["versions"].items()))
    same = result["documents"]
    print(f"documents: {same['tutelage']:,} from tutelage, {same['trl']:,} from TRL", end="; ")
    print(f"{same['same_ids']:,} have equal ids, {same['same_trained']:,} equal trained tokens too")
    ours, theirs = ({name: [run[name] for run in by_side[side]] for name in ("seconds", "cpu_seconds")} for side in SIDES)
    result["cpu_ratio"] = median(theirs["cpu_seconds"]) / median(ours["cpu_seconds"])
    result["ratio"] = ratio = median(theirs["seconds"]) / median(ours["seconds"])
    rounds = sorted(b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1))
    print(f"rows per CPU second, tutelage / TRL: {result['cpu_ratio']:.2f}")
    print(f"rows per second, tutelage / TRL: {ratio:.2f} (rounds {rounds[0]:.2f} to {rounds[-1]:.2f}); bar {BAR}")
    return int(options.check and (ratio < BAR or same["same_trained"] < same["tutelage"]))


def table_line(label: str, runs: list[dict[str, Any]]) -> str:
    m = {name: median(run[name] for run in runs) for name, value in runs[0].items() if isinstance(value, int | float)}
    speeds = [run["rows_per_second"] for run in runs]
    cells = f"{m['rows_per_second']:9,.0f}{f'({min(speeds):,.0f}-{max(speeds):,.0f})':>17}{m['num_tokens'] / m['seconds']:11,.0f}"
    more = f"{m['cpu_seconds']:8.1f}{m['peak_bytes'] / 1e6:9,.0f}{m['packing_efficiency']:9.2%}{m['process_seconds']:11.1f}"
    return f"{label:11}{cells}{more}"


if __name__ == "__main__":
    sys.exit(main())

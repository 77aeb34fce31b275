"""Preparation of the same conversations, from JSONL to packed rows on disk: tutelage beside TRL.

    python benchmarks/prepare.py                 # about two minutes on two cores, after the peer's environment exists
    python benchmarks/prepare.py --quick         # under one minute
    python benchmarks/prepare.py --check         # fails below the bar, or when the two sides do not do the same work

    conversations.jsonl --tutelage: run(until="plan"), empty store--> documents --\
                        --TRL: SFTTrainer's own preparation---------> documents ---> equal ids, equal trained tokens?

Each measurement is a process of its own with empty caches; the sides take turns. Seconds run from opening the JSONL to the
last file on disk, without imports (TRL's take several times longer) and without making the trainer. TRL gets one process
per core, `assistant_only_loss` and `packing_strategy="bfd"`, in an environment of its own under `.peers`. Cleaning and
held-out split have no counterpart there: they are off in the comparison, and `tutelage, curated` is measured beside it.
Held against TRL the work differs in this: tutelage keeps the kind and turn of every token and proves them, looks at the
text's hashes, and syncs what it writes; TRL writes each intermediate table, and cuts rows that tutelage would set aside.
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
from importlib import import_module, metadata, util
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = HERE / ".peers"
PEER = (["torch==2.13.0"], ["trl==1.16.0", "datasets==5.2.0", "transformers==5.23.0"])
"""Installed one after the other: with torch alone first, pip does not choose another build of it."""
DEMONSTRATION = HERE.parent / "recipes" / "data" / "*.jsonl*"
CAPACITY = 2048
BAR = 3.5
"""Rows per second over TRL's, with a tokenizer that no faster engine reads exactly (SmolLM2's)."""
SIDES = ("tutelage", "trl")
ALL_SIDES = (*SIDES, "curated")
PACKAGES = {
    "tutelage": ("tutelage", "tokenizers", "numpy", "pyarrow", "jinja2"),
    "trl": ("trl", "transformers", "datasets", "tokenizers", "torch", "pyarrow"),
}
RULES = ["strip_boilerplate", {"length": {"max_response_words": 600}}, {"repetition": {"max_share": 0.3}}, "refusal"]
PLAIN = {"rules": [], "near_duplicates": None, "exact_duplicates": "keep"}
CURATED = {"rules": RULES, "near_duplicates": {"threshold": 0.8}}
_STOP = "<|im_end|>"
UNMARKED = f"{{{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '{_STOP}' + '\n'}}}}"
MARKED = (
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + "
    f"'{_STOP}' }}}}{{% endgeneration %}}{{% else %}}{{{{ message['content'] + '{_STOP}' }}}}{{% endif %}}{{{{ '\n' }}}}"
)
"""What TRL needs and SmolLM2's template lacks: marks around what the assistant writes. The text stays the same."""


def main() -> int:
    options = read_options()
    if options.side:
        run_side(options.side, Path(options.folder))
        return 0
    make_peer()
    print_machine()
    with tempfile.TemporaryDirectory(prefix="prepare-") as folder:
        job = make_job(options, Path(folder))
        runs = [measure(side, n, job) for n in range(options.rounds) for side in ALL_SIDES]
        equal = compare(Path(folder))
    result = {"machine": machine(), "options": vars(options), "job": job, "runs": runs, "equal": equal}
    return report(result, options)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Preparation of the same conversations: tutelage beside TRL.")
    parser.add_argument("--data", metavar="GLOB", default=str(DEMONSTRATION), help="JSONL files of any shape, .gz too")
    parser.add_argument("--rows", type=int, help="how many conversations; fewer are repeated with suffixes (20,000; quick 4,000)")
    parser.add_argument("--model", metavar="FOLDER_OR_NAME", default="bundled:smollm2-135m", help="whose tokenizer and template")
    parser.add_argument("--rounds", type=int, help="measurements per side (3; quick 2)")
    parser.add_argument("--processes", type=int, default=num_cores(), help="of TRL's dataset.map (one per core)")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", metavar="FILE", help="writes everything that was measured")
    parser.add_argument("--check", action="store_true", help=f"exit code 1 below {BAR} times TRL's rows/s")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.rows = options.rows or (4_000 if options.quick else 20_000)
    options.rounds = options.rounds or (2 if options.quick else 3)
    return options


# ---- the job: environment, tokenizer, conversations


def make_peer() -> None:
    folder = PEERS / "trl"
    wanted = json.dumps(PEER)
    if (folder / "installed").is_file() and (folder / "installed").read_text() == wanted:
        return
    print(f"making TRL's environment in {folder}, once: about 1.5 GB, some minutes", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    for packages in PEER:
        subprocess.run([str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *packages], check=True)
    (folder / "installed").write_text(wanted)


def make_job(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What every process is told; the conversations lie in `folder`, one `{"messages": [...]}` per line."""
    tokenizer = tokenizer_folder(options.model)
    lines = [json.dumps({"messages": turns}) + "\n" for turns in islice(conversations(options.data), options.rows)]
    (folder / "conversations.jsonl").write_text("".join(lines), encoding="utf-8")
    size_bytes = (folder / "conversations.jsonl").stat().st_size
    print(f"{len(lines):,} conversations, {size_bytes / 1e6:.1f} MB; tokenizer of {options.model}; {CAPACITY:,} slots a row\n")
    return {"folder": str(folder), "tokenizer": str(tokenizer), "rows": len(lines), "processes": options.processes}


def tokenizer_folder(name: str) -> Path:
    """A folder with the model's tokenizer and stand-in weights: preparation needs no weights, but tutelage hashes them."""
    import numpy as np
    from safetensors.numpy import save_file

    from tutelage.model.names import materialise, resolve
    from tutelage.model.stage import TOKENIZER_FILES

    target = PEERS / "tokenizers" / "".join(c if c.isalnum() else "-" for c in name)
    with tempfile.TemporaryDirectory() as folder:
        if not (target / "config.json").is_file():
            whole = materialise(resolve(name), Path(folder))
            target.mkdir(parents=True, exist_ok=True)
            save_file({"stand_in": np.zeros(1, np.float32)}, target / "model.safetensors")
            for file in TOKENIZER_FILES:
                if (whole / file).is_file():
                    shutil.copyfile(whole / file, target / file)
    return target


def conversations(pattern: str) -> Iterator[list[dict[str, str]]]:
    """The records of the files in one mixed order, over and over; each message of the second, third, ... time ends in " (2)", " (3)", ..."""
    first = [turns for path in sorted(glob.glob(pattern)) for turns in plain_turns(Path(path))]
    if not first:
        raise SystemExit(f"--data {pattern}: no conversations there; give a glob of JSONL files")
    random.Random(0).shuffle(first)
    for lap in count(1):
        for turns in first:
            yield [{**turn, "content": f"{turn['content']} ({lap})"} for turn in turns] if lap > 1 else turns


def plain_turns(path: Path) -> Iterable[list[dict[str, str]]]:
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


# ---- measuring, in processes of their own


def measure(side: str, number: int, job: dict[str, Any]) -> dict[str, Any]:
    """One measurement. Imports and interpreter start are in `process_seconds` alone."""
    folder = Path(job["folder"], f"{side} {number}")
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(job | {"side": side, "keeps_documents": number == 0}))
    hidden = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    python = [str(PEERS / "trl/bin/python"), "-I"] if side == "trl" else [sys.executable]
    started = time.perf_counter()
    command = [*python, str(Path(__file__).resolve()), "--side", side, "--folder", str(folder)]
    done = subprocess.run(command, env=os.environ | hidden, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result = {"side": side, **json.loads((folder / "result.json").read_text())}
    result["process_seconds"] = time.perf_counter() - started
    print(f"  {side:9} {job['rows'] / result['seconds']:9,.0f} rows/s   {result['seconds']:6.2f} s", flush=True)
    for path in folder.iterdir():  # the next measurement finds the same room on the disk
        if path.is_dir():
            shutil.rmtree(path)
    return result


def run_side(side: str, folder: Path) -> None:
    """What a measuring process does: prepares, writes result.json, and in the first round documents.txt."""
    job = json.loads((folder / "job.json").read_text())
    result, documents = prepare_with_trl(job, folder) if side == "trl" else prepare_with_tutelage(job, folder)
    result["versions"] = {name: version(name) for name in PACKAGES["trl" if side == "trl" else "tutelage"]}
    result["versions"]["python"] = platform.python_version()
    (folder / "result.json").write_text(json.dumps(result))
    if job["keeps_documents"]:
        lines = (f"{md5(ids).hexdigest()} {md5(trained).hexdigest()}\n" for ids, trained in documents)
        (folder / "documents.txt").write_text("".join(lines))


class Meter:
    """Wall and CPU seconds of a `with` block, finished child processes included; peaks are of the largest process."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> Meter:
        self.started = time.perf_counter(), cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.started[0]
        self.cpu_seconds += cpu_seconds() - self.started[1]
        self.peak_bytes = max(own_peak_bytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)

    def as_json(self) -> dict[str, float]:
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "peak_bytes": self.peak_bytes}


def prepare_with_tutelage(job: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Iterator[tuple[bytes, bytes]]]:
    import yaml

    import tutelage
    import tutelage.pipeline
    from tutelage.evaluate.stage import open_shards
    from tutelage.plan.batch import Batches
    from tutelage.tables import read_table

    recipe = {
        "name": "prepare",
        "model": {"name": job["tokenizer"]},
        "sources": {"all": {"path": str(Path(job["folder"], "conversations.jsonl")), "licence": "MIT"}},
        "split": {"held_out_share": 0},
        "curate": CURATED if job["side"] == "curated" else PLAIN,
        "render": {"max_tokens": CAPACITY, "overlong": "drop"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name in ("numba", "pandas"):  # else imported on the way, where there; TRL has long imported what it needs
        if util.find_spec(name):
            import_module(name)
    with Meter() as meter:
        file = tutelage.load_recipe(folder / "recipe.yaml")
        run = tutelage.run(file, until="plan", store=folder / "store", runs=folder / "runs")
    plan = run.artefacts["plan"]
    num_rows = len(set(read_table(plan.file("placements.parquet"))["row"].to_pylist()))  # the last step's empty rows aside
    tokens = plan.facts["real_tokens"]
    result = meter.as_json() | {"num_tokens": tokens, "packing_efficiency": tokens / (num_rows * CAPACITY)}
    result["stages"] = {label: artefact.manifest["seconds"] for label, artefact in run.artefacts.items()}
    result["dropped"] = plan.manifest["counts"]["dropped"]
    return result, planned_documents(Batches(plan.path, open_shards(run.artefacts)))


def planned_documents(batches: Iterable[Any]) -> Iterator[tuple[bytes, bytes]]:
    """Ids, and for each but the first whether it is trained, of every document as training will get it."""
    for batch in batches:
        for at in batch.documents:
            own = at.row - int(batch.documents[0].row), slice(at.start, at.start + at.length)
            yield batch.inputs[own].tobytes(), (batch.weights[own][:-1] > 0).tobytes()


def prepare_with_trl(job: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Iterator[tuple[bytes, bytes]]]:
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
    quiet = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "output_dir": str(folder / "out")}
    args = SFTConfig(**how, **quiet, dataset_num_proc=job["processes"] if job["processes"] > 1 else None)
    with meter:
        dataset = load_dataset("json", data_files=str(Path(job["folder"], "conversations.jsonl")), split="train")
    made = Timed(model=model, args=args, train_dataset=dataset, processing_class=tokenizer).train_dataset
    tokens = sum(sum(row) for row in made["seq_lengths"])
    return meter.as_json() | {"num_tokens": tokens, "packing_efficiency": tokens / (len(made) * CAPACITY)}, packed_documents(made)


def packed_documents(dataset: Any) -> Iterator[tuple[bytes, bytes]]:
    """As `planned_documents`, of TRL's packed rows."""
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
    """Prints the table; the exit code."""
    sides = {side: [run for run in result["runs"] if run["side"] == side] for side in ALL_SIDES}
    rows = result["job"]["rows"]
    print(f"\n{'':19}{'rows/s':>9}{'(range)':>19}{'tokens/s':>12}{'CPU s':>8}{'peak MB':>9}{'packed':>9}{'process s':>11}")
    for side, label in (("tutelage", "tutelage"), ("trl", "TRL"), ("curated", "tutelage, curated")):
        print(table_line(label, sides[side], rows))
    stages = {name: median(run["stages"][name] for run in sides["tutelage"]) for name in sides["tutelage"][0]["stages"]}
    print("\ntutelage's seconds: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in stages.items()))
    print(f"tutelage, curated, set aside: {sides['curated'][0]['dropped'] or 'nothing'}")
    for side in SIDES:
        print(f"{side}: " + ", ".join(f"{name} {number}" for name, number in sides[side][0]["versions"].items()))
    same = result["equal"]
    is_equal = same["same_trained"] == same["tutelage"]
    print(f"documents: {same['tutelage']:,} from tutelage, {same['trl']:,} from TRL; {same['same_ids']:,} have equal ids,", end=" ")
    print(f"{same['same_trained']:,} equal trained tokens too")
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(sides["tutelage"], sides["trl"], strict=True)]
    result["ratio"] = ratio = median(b["seconds"] for b in sides["trl"]) / median(a["seconds"] for a in sides["tutelage"])
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1))
    print(f"tutelage / TRL, rows per second: {ratio:.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f}); bar {BAR}")
    return int(options.check and (ratio < BAR or not is_equal))


def table_line(label: str, runs: list[dict[str, Any]], rows: int) -> str:
    speeds = sorted(rows / run["seconds"] for run in runs)
    m = {name: median(run[name] for run in runs) for name, value in runs[0].items() if isinstance(value, int | float)}
    spread = f"({speeds[0]:,.0f}-{speeds[-1]:,.0f})"
    cells = f"{rows / m['seconds']:9,.0f}{spread:>19}{m['num_tokens'] / m['seconds']:12,.0f}{m['cpu_seconds']:8.1f}"
    return f"{label:19}{cells}{m['peak_bytes'] / 1e6:9,.0f}{m['packing_efficiency']:9.2%}{m['process_seconds']:11.1f}"


# ---- the machine


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu, "cores": num_cores(), "memory_bytes": memory, "system": platform.platform(), "load": os.getloadavg()[0]}


def print_machine() -> None:
    m = machine()
    print(f"{m['cpu']}, {m['cores']} cores, {m['memory_bytes'] / 2**30:.0f} GiB, {m['system']}; load {m['load']:.1f}")


def cpu_seconds() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in spent)


def own_peak_bytes() -> int:
    """Peak resident memory of this process; ru_maxrss would count the process that started it where /proc is there."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))) * 1024


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        import tutelage

        return tutelage.__version__


if __name__ == "__main__":
    sys.exit(main())

"""tutelage's own side of the comparison, and the floor: its tokenizer on ready texts, and nothing else."""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from importlib import import_module, util
from pathlib import Path
from typing import Any

from peer_data import HEADERS, read_lines, write_million
from peer_meter import Meter, own_peak_bytes

RULES = ["strip_boilerplate", {"length": {"max_response_words": 600}}, {"repetition": {"max_share": 0.3}}, "refusal"]
PLAIN = {"rules": [], "near_duplicates": None, "exact_duplicates": "keep"}
CURATED = {"rules": RULES, "near_duplicates": {"threshold": 0.8}}
SIDES: dict[str, dict[str, Any]] = {
    "tutelage": {},
    "opened": {"open_first": True},
    "tokenizers": {"engine": "tokenizers"},
    "one-by-one": {"in_turn": True},
    "curated": {"curate": CURATED},
}
"""Ours by name: as it comes; its tokenizer open before; the plain engine; its two threads one after the other; cleaning too."""
ROOMS = ("sources", "curate", "render", "plan", "report")
IMPORTED = (
    "email.policy",
    "email.parser",
    "pandas",
    "gigatoken",
    "awkward",
    "pyarrow.compute",
    "pyarrow.parquet",
    "fsspec.implementations.local",
)
VERSIONS = ("tutelage", "tokenizers", "gigatoken", "numpy", "pyarrow")

Documents = Iterator[tuple[bytes, bytes]]
"""Of every document as training gets it: its ids, and of each token but the first whether it is trained."""


def warm_store(model: Path, folder: Path) -> Path:
    """A store with `model` and `tokenizer` of this model folder, which every measurement starts from a copy of."""
    import tutelage

    folder.mkdir()
    one = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (folder / "one.jsonl").write_text(json.dumps({"messages": one}) + "\n")
    recipe = _recipe({"model": str(model), "files": {"one": "one.jsonl"}, "capacity": 2048})
    file = tutelage.load_recipe(_written(recipe, folder))
    tutelage.run(file, until="render", store=folder / "store", runs=folder / "runs")
    for kept in (folder / "store").iterdir():
        if kept.name not in ("model", "tokenizer", "digests"):
            shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
    return folder / "store"


def _recipe(job: dict[str, Any], *, engine: str = "auto", curate: dict[str, Any] = PLAIN) -> dict[str, Any]:
    # The peers let special tokens spelled in messages through; so that ids can be compared, so do we here.
    render = {"max_tokens": job["capacity"], "overlong": "drop", "tokenizer_engine": engine, "special_tokens_in_content": "allow"}
    sources = {name: {"path": path, "licence": "any"} for name, path in job["files"].items()}
    return {
        "name": "prepare",
        "model": {"name": job["model"]},
        "sources": sources,
        "curate": curate,
        "split": {"held_out_share": 0},
        "render": render,
    }


def _written(recipe: dict[str, Any], folder: Path) -> Path:
    import yaml

    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def prepare(
    job: dict[str, Any],
    folder: Path,
    *,
    engine: str = "auto",
    curate: dict[str, Any] = PLAIN,
    in_turn: bool = False,
    open_first: bool = False,
) -> tuple[dict[str, Any], Documents]:
    """Reads and renders, which is timed as `seconds`, then goes on to packed rows: `packed_seconds` from the beginning."""
    import tutelage

    import_all()
    store = Path(shutil.copytree(job["store"], folder / "store"))
    path = _written(_recipe(job, engine=engine, curate=curate), folder)
    if in_turn:
        os.environ["TUTELAGE_PROCESSES"] = "1"
    clocks = _watch(in_turn=in_turn)
    if open_first:
        _open(store, path)
    meter, rest = Meter(), Meter()
    with meter:
        file = tutelage.load_recipe(path)
        rendered = tutelage.run(file, until="render", store=store, runs=folder / "runs").artefacts
    peak = own_peak_bytes()
    with rest:
        made = tutelage.run(file, until="plan", store=store, runs=folder / "runs").artefacts
    result = _told(rendered, made, job["capacity"])
    result |= meter.spent | {f"packed_{name}": value + rest.spent[name] for name, value in meter.spent.items()}
    result |= {"engine": clocks["encode"].spent, "opening": clocks["open"].spent, "rendering_peak_bytes": peak}
    return result, _documents(made)


def _open(store: Path, recipe: Path) -> None:
    """Opens the store's tokenizer and proves its engine."""
    import tutelage
    from tutelage.render.stage import warm_up

    file = tutelage.load_recipe(recipe)
    warm_up(next((store / "tokenizer").iterdir()), spec=file.recipe.render, base=file.folder)


def import_all() -> None:
    """Everything that is imported on the way otherwise, compiled loops too, as the peers have theirs when their clock starts."""
    import_module("tutelage.pipeline")
    for room in ROOMS:
        package = import_module(f"tutelage.{room}")
        for module in pkgutil.iter_modules(package.__path__):
            import_module(f"tutelage.{room}.{module.name}")
    for name in IMPORTED:
        if util.find_spec(name.partition(".")[0]):
            import_module(name)
    import_module("numba.core.entrypoints").init_all()
    import_module("tutelage.render.kernels").load_kernels()
    import_module("tutelage.sources.keys").load_kernels()


def _told(rendered: dict[str, Any], made: dict[str, Any], capacity: int) -> dict[str, Any]:
    from tutelage.tables import read_table

    plan, renders = made["plan"], [each for label, each in rendered.items() if label.startswith("render ")]
    num_rows = len(set(read_table(plan.file("placements.parquet"))["row"].to_pylist()))  # without the last step's empty rows
    dropped = {reason: 0 for each in renders for reason in each.manifest["counts"]["dropped"]}
    for each in renders:
        for reason, number in each.manifest["counts"]["dropped"].items():
            dropped[reason] += number
    stages: dict[str, float] = {}
    for label, artefact in made.items():
        if not artefact.is_hit or label in rendered:
            name = label.partition(" ")[0]
            stages[name] = stages.get(name, 0.0) + artefact.manifest["seconds"]
    return {
        "num_tokens": sum(each.facts["num_tokens"] for each in renders),
        "packing_efficiency": plan.facts["real_tokens"] / (num_rows * capacity),
        "engine_name": sorted({each.facts["tokenizer_engine"]["name"] for each in renders}),
        "dropped": dropped,
        "stages": {name: value for name, value in stages.items() if name not in ("model", "tokenizer")},
    }


def _documents(made: dict[str, Any]) -> Documents:
    from tutelage.evaluate.stage import open_shards
    from tutelage.plan.batch import Batches

    return planned_documents(Batches(made["plan"].path, open_shards(made)))


def planned_documents(batches: Iterable[Any]) -> Documents:
    for batch in batches:
        for at in batch.documents:
            own = at.row - batch.documents[0].row, slice(at.start, at.start + at.length)
            yield batch.inputs[own].tobytes(), (batch.weights[own][:-1] > 0).tobytes()


# ---- inside and outside the tokenizer


def _watch(*, in_turn: bool) -> dict[str, Meter]:
    """Clocks on the calls that encode, and on opening the tokenizer and proving its engine.

    CPU seconds are those of the whole process during the call. With `in_turn` nothing runs beside it, so they are its own.
    """
    import tutelage.render.engines as engines
    import tutelage.render.examples as examples
    import tutelage.render.stage as stage

    clocks = {"encode": Meter(), "open": Meter()}
    engines.Chosen.encode = _timed(engines.Chosen.encode, clocks["encode"])  # type: ignore[method-assign]
    stage._opened = _timed(stage._opened, clocks["open"])  # type: ignore[assignment]
    for name in ("choose_engine", "Encoder"):
        setattr(examples, name, _timed(getattr(examples, name), clocks["open"]))
    if in_turn:
        stage.ThreadPoolExecutor = _InTurn  # type: ignore[assignment, misc]
    return clocks


def _timed(call: Callable[..., Any], clock: Meter) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clock:
            return call(*args, **kwargs)

    return timed


class _InTurn:
    """An executor that does what it is given at once."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> _InTurn:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(call(*args))
        return done


# ---- the floor


def floor(job: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Documents]:
    """`tokenizers.encode_batch_fast` on the rendered texts, 4,096 a time, ids kept; and how many texts are others natively."""
    from tutelage.render.template import ChatTemplate
    from tutelage.render.tokenizer import open_tokenizer

    tokenizer, model = open_tokenizer(Path(job["model"])), Path(job["model"])
    marked = ChatTemplate(tokenizer.templates["default"], special_tokens=tokenizer.special_tokens)
    texts = [marked.render(turns) for turns in read_lines(job["files"].values())]
    meter, ids = Meter(), []
    with meter:
        for first in range(0, len(texts), 4096):
            encodings = tokenizer.backend.encode_batch_fast(texts[first : first + 4096], add_special_tokens=False)
            ids += [encoding.ids for encoding in encodings]
    result = {**meter.spent, "num_tokens": sum(map(len, ids))}
    if job["lists_documents"]:
        native = ChatTemplate((model / "native.jinja").read_text(encoding="utf-8"), special_tokens=tokenizer.special_tokens)
        ending = HEADERS.get(model.name, "")
        pairs = zip(texts, read_lines(job["files"].values()), strict=True)
        result["num_other_texts"] = sum(text + ending != native.render(turns) for text, turns in pairs)
    return result, iter(())


# ---- a million records


def million(job: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Documents]:
    """Reads and renders a million records in one process; the peak is all that it ever used, imports included."""
    import tutelage

    write_million(job["files"].values(), folder / "million.jsonl", rows=job["num_million"])
    started = time.perf_counter()
    store = Path(shutil.copytree(job["store"], folder / "store"))
    file = tutelage.load_recipe(_written(_recipe({**job, "files": {"all": str(folder / "million.jsonl")}}), folder))
    made = tutelage.run(file, until="render", store=store, runs=folder / "runs").artefacts
    counts = made["render all"].manifest["counts"]
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "own_peak_bytes": own_peak_bytes(), "counts": counts, "num_tokens": 0}, iter(())

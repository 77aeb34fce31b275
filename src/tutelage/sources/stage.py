"""The door of this room to the store: `read` for each source, and the one `split`."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tutelage.errors import DataError, did_you_mean
from tutelage.sources.gather import DroppedWriter, Gatherer, Labels, write_group
from tutelage.sources.read import DataFile, HubData, find_files, find_hub, read_blocks, read_hub
from tutelage.sources.reasons import MALFORMED
from tutelage.sources.scan import Block
from tutelage.sources.spec import IntakeSpec, SourceSpec, SplitSpec
from tutelage.sources.split import add_sides, count_sides, held_out_flags, notes_on
from tutelage.store import Artefact, Counts, Outcome, Progress, Stage, Store
from tutelage.tables import RECORD_WEIGHTS, SPLIT, in_pieces, read_dropped, read_table, write_table

CONVERSATIONS_FILE = "conversations.parquet"
DROPPED_FILE = "dropped.parquet"
WEIGHTS_FILE = "weights.parquet"  # only where the recipe names a `weight_field`
SPLIT_FILE = "split.parquet"
_NOT_IN_KEY = {"path", "dataset", "weight"}
_NO_WEIGHTS = ("weight_field", None)


def read_stage(name: str, spec: SourceSpec, *, intake: IntakeSpec, base: Path, store: Store) -> Stage:
    """The box that turns one source's files into conversations.parquet and dropped.parquet.

    DataError at once when a path leads to nothing; `weight` and `max_bad_share` change nothing that is written.
    """
    labels = Labels(name, spec, intake)
    data: list[DataFile] | HubData
    data = find_files(spec.path, base) if spec.path is not None else find_hub(str(spec.dataset), spec.split_name)
    digests = {each.name: _digest(each, store) for each in data} if isinstance(data, list) else _hub_digest(data, store)

    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        progress.start(f"read {name}", None, "records")
        outcome = _read(folder, data, labels, progress)
        for each in data if isinstance(data, list) else []:
            if _digest(each, store) != digests[each.name]:
                raise DataError(f"{each.name}: changed while it was being read; run again")
        return outcome

    ingredients = {
        "files": digests,
        "source": name,
        "spec": {key: value for key, value in spec.canonical().items() if key not in _NOT_IN_KEY and (key, value) != _NO_WEIGHTS},
        "intake": {key: value for key, value in intake.canonical().items() if key != "max_bad_share"},
        "unicode": unicodedata.unidata_version,  # normalisation follows its tables
    }
    return Stage("read", 3, ingredients, build, slot=name, packages=("datasets",) if isinstance(data, HubData) else ())


def _digest(file: DataFile, store: Store) -> str:
    return store.file_digest(file.local) if file.local is not None else file.remote_digest()


def _hub_digest(data: HubData, store: Store) -> dict[str, str]:
    """The revision on the hub; of a folder on this machine, its files."""
    if data.revision is not None:
        return {data.name: data.revision}
    folder = Path(data.dataset.partition(":")[0])
    return {path.as_posix(): store.file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _read(folder: Path, data: list[DataFile] | HubData, labels: Labels, progress: Progress) -> Outcome:
    dropped = DroppedWriter(labels.source, folder / DROPPED_FILE)
    gatherer = Gatherer(labels, folder / CONVERSATIONS_FILE, dropped)
    facts = {}
    for name, blocks in _streams(data, labels.intake.max_record_bytes):
        try:
            facts[name] = gatherer.take_file(name, blocks, progress.advance)
        except DataError as error:
            told = str(error)
            raise DataError(told if told.startswith(name) else f"{name}: {told}") from error
    gatherer.close()
    num_kept = gatherer.num_kept
    if labels.spec.weight_field is not None:
        weights = pa.table({"weight": np.asarray(gatherer.weights)}, schema=RECORD_WEIGHTS)
        assert len(weights) == num_kept, "one weight per record"
        write_table(folder / WEIGHTS_FILE, weights)
    if labels.spec.max_records is not None and num_kept > labels.spec.max_records:
        num_kept = _sample(gatherer.path, labels.spec.max_records, dropped)
    dropped.close()
    return Outcome(Counts(gatherer.num_records, num_kept, dict(dropped.counts)), {"files": facts})


def _streams(data: list[DataFile] | HubData, max_bytes: int) -> Iterator[tuple[str, Iterator[Block]]]:
    if isinstance(data, HubData):
        yield data.name, read_hub(data)
    else:
        for each in data:
            yield each.name, read_blocks(each, max_bytes=max_bytes)


def _sample(path: Path, max_records: int, dropped: DroppedWriter) -> int:
    """Keeps the `max_records` records with the smallest hash of (file, line, part), in their order."""
    draws = np.concatenate([_draws(batch) for batch in in_pieces(path).iter_batches(columns=["file", "line", "part"])])
    is_kept = np.zeros(len(draws), np.bool_)
    is_kept[np.argsort(draws, kind="stable")[:max_records]] = True
    whole, writer, first = in_pieces(path), None, 0
    sampled = path.with_suffix(".sample")
    for group in range(whole.num_row_groups):
        table = whole.read_row_group(group)
        flags = is_kept[first : first + table.num_rows]
        writer = write_group(writer, sampled, table.filter(pa.array(flags)))
        left_out = table.select(["file", "line"]).filter(pa.array(~flags))
        for file, line in zip(left_out["file"].to_pylist(), left_out["line"].to_pylist(), strict=True):
            dropped.add(file, line, "not_sampled", detail=f"max_records is {max_records}")
        first += table.num_rows
    assert writer is not None
    writer.close()
    sampled.replace(path)
    weights = path.with_name(WEIGHTS_FILE)
    if weights.exists():
        write_table(weights, read_table(weights, RECORD_WEIGHTS).filter(pa.array(is_kept)))
    return max_records


def _draws(batch: pa.RecordBatch) -> NDArray[np.uint64]:
    rows = zip(*(batch[name].to_pylist() for name in ("file", "line", "part")), strict=True)
    digests = b"".join(blake2b(f"{file}\0{line}\0{part}".encode(), digest_size=8).digest() for file, line, part in rows)
    return np.frombuffer(digests, np.uint64)


def check_bad_share(artefact: Artefact, intake: IntakeSpec) -> None:
    """DataError when more than `max_bad_share` of a file's records are malformed: which file, how many, why, what to do."""
    problems = []
    for name, fact in artefact.facts["files"].items():
        share = fact["bad"] / fact["records"] if fact["records"] else 0.0
        if share > intake.max_bad_share:
            problems.append(_bad_file(artefact, name, fact, intake.max_bad_share))
    if problems:
        raise DataError("\n".join(problems))


def _bad_file(artefact: Artefact, name: str, fact: Mapping[str, Any], bound: float) -> str:
    path = artefact.file(DROPPED_FILE)
    bad = [d for d in read_dropped(path) if d.file == name and d.reason in MALFORMED]
    first = [f"  line {d.line}: {d.reason}{f' ({d.detail})' if d.detail else ''}" for d in bad[:3]]
    share = fact["bad"] / fact["records"]
    told = f"{fact['bad']} of {fact['records']} records are malformed ({share:.2%}; at most {bound:.2%} may be)"
    read_as = f"  read as {fact['shape']}: {fact['why']}"
    advice = f"  mend the file, set its `shape`, or raise intake.max_bad_share; all of them: {path}"
    return "\n".join([f"{name}: {told}", *first, read_as, advice])


def split_stage(reads: dict[str, Stage], *, spec: SplitSpec) -> Stage:
    """The box that says of every record of every source whether it is held out: split.parquet."""

    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        progress.start("split", None, "records")
        return _split(folder / SPLIT_FILE, inputs, spec, progress)

    return Stage("split", 1, spec.canonical(), build, inputs=reads)


def _split(path: Path, inputs: Mapping[str, Artefact], spec: SplitSpec, progress: Progress) -> Outcome:
    sides: dict[str, dict[str, int]] = {}
    writer, num_records = None, 0
    for source in sorted(inputs):
        first = 0
        file = in_pieces(inputs[source].file(CONVERSATIONS_FILE))
        for batch in file.iter_batches(columns=["prompt_key", "task"]):
            names = batch["task"].dictionary.to_pylist()
            tasks = [names[code] for code in batch["task"].indices.to_numpy().tolist()]
            keys = batch["prompt_key"].to_numpy(zero_copy_only=False).tolist()
            flags = held_out_flags(keys, tasks, share=spec.held_out_share, seed=spec.seed, unseen_tasks=spec.unseen_tasks)
            sides = add_sides(sides, count_sides(tasks, flags))
            writer = write_group(writer, path, _split_table(source, first, flags))
            first += len(flags)
            progress.advance(len(flags))
        num_records += first
    write_group(writer, path, SPLIT.empty_table()).close()
    for task in spec.unseen_tasks:
        if task not in sides:
            raise DataError(f"split.unseen_tasks: no record has the task {task!r}; {did_you_mean(task, sides)}")
    notes = notes_on(sides, share=spec.held_out_share, unseen_tasks=spec.unseen_tasks)
    return Outcome(Counts(num_records, num_records), {"tasks": sides, "notes": notes})


def _split_table(source: str, first: int, flags: NDArray[np.bool_]) -> pa.Table:
    rows = np.arange(first, first + len(flags), dtype=np.int64)
    sources = pa.DictionaryArray.from_arrays(np.zeros(len(flags), np.int32), pa.array([source]))
    return pa.table([sources, rows, flags], schema=SPLIT)

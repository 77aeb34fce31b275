"""One recipe run by several processes: the first prepares the data, all train, the first measures and reports.

    rank 0    read ... plan, audit ------- calls --> train --> measure after, report --- dismisses -->
    others    wait (no time limit) ------- hear ---> train --> wait --------------------------------->

Every rank makes its own plan of stages from the recipe and must come to the same keys; the others find what the first
prepared in the store, which is one shared folder, or a copy made beforehand at the same path.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

from tutelage.errors import StoreError, TrainError
from tutelage.store import Artefact, Progress, Silent, Stage, Store, digest_json
from tutelage.world import World, differing, entered, meet, num_started, rank_started

TOGETHER = "train"
"""The stage that all ranks build."""
_calls: list[str | None] = []
"""What was called for so far, by the first rank or to this one; messages are numbered by it."""


def is_led() -> bool:
    """Whether this process waits to be called by another one."""
    return rank_started() > 0


def produce_together(
    store: Store, stages: Mapping[str, Stage], label: str, inputs: Mapping[str, Artefact], progress: Progress
) -> Artefact:
    """The artefact of a stage that all ranks build together; by this one alone where there is no other."""
    stage = stages[label]
    if num_started() == 1 or stage.name != TOGETHER or store.find(stage) is not None:
        return store.produce(stage, inputs, progress)
    world = _call(label)
    progress.note(f"{label}: {world.size} processes")
    with entered(world, name=f"world {len(_calls)}"):
        require_same_keys(world, stages, label)
        return store.produce(stage, inputs, progress)


def dismiss() -> None:
    """Nothing; the others hear that there is nothing left to do."""
    if num_started() > 1:
        _call(None)


def _call(label: str | None) -> World:
    world = meet()
    world.tell(f"call {len(_calls)}", label)
    _calls.append(label)
    return world


def follow(plan: Callable[[], tuple[Store, Mapping[str, Stage]]]) -> None:
    """Nothing; does its part of every stage it is called to, until it is dismissed. `plan` is asked when the data are ready."""
    world = meet()
    while (label := _hear(world)) is not None:
        store, stages = plan()
        with entered(world, name=f"world {len(_calls)}"):
            require_same_keys(world, stages, label)
            stage = stages[label]
            inputs = {name: _found(store, upstream, world) for name, upstream in stage.inputs.items()}
            stage.build(store.work_folder(stage), inputs, Silent())


def _hear(world: World) -> str | None:
    label: str | None = world.hear(f"call {len(_calls)}")
    _calls.append(label)
    return label


def _found(store: Store, stage: Stage, world: World) -> Artefact:
    artefact = store.find(stage)
    if artefact is None:
        raise StoreError(
            f"rank {world.rank} on {socket.gethostname()}: {store.root.resolve()} has no `{stage.label}` ({stage.key}); the "
            "store must be one folder that all machines share (`--store`), or be copied to the same path on each before the run"
        )
    return artefact


def require_same_keys(world: World, stages: Mapping[str, Stage], label: str) -> None:
    """Nothing; raises `TrainError` on every rank, naming the first stage and ingredient that they do not agree on."""
    if odd := odd_stage(world, upstream_of(stages, label)):
        raise TrainError(f"{odd}. Start every process with the same recipe, data files, packages and version of tutelage")


def upstream_of(stages: Mapping[str, Stage], label: str) -> dict[str, Stage]:
    """The stages that a stage depends on, and itself, upstream first."""
    wanted = {stages[label].key}
    for stage in reversed(list(stages.values())):
        if stage.key in wanted:
            wanted |= {upstream.key for upstream in stage.inputs.values()}
    return {name: stage for name, stage in stages.items() if stage.key in wanted}


def odd_stage(world: World, stages: Mapping[str, Stage]) -> str:
    """What the ranks do not agree on, "" when they do: the first stage with different keys, and who has what of it."""
    names = world.gather(sorted(stages))
    if odd := differing(names):
        return f"the ranks have different stages: {odd}"
    for label, keys in _by_label(world.gather({label: stage.key for label, stage in stages.items()})).items():
        if differing(keys):
            told = world.gather({name: digest_json(value)[:8] for name, value in stages[label].all_ingredients.items()})
            wrong = {name: odd for name, values in _by_label(told).items() if (odd := differing(values))}
            return f"`{label}` is not the same on all ranks: " + "; ".join(f"{name} is {odd}" for name, odd in wrong.items())
    return ""


def _by_label(told: list[dict[str, str]]) -> dict[str, list[str]]:
    """What each rank told, turned round: by name, then by rank; "" from a rank that does not have it."""
    names = dict.fromkeys(name for one in told for name in one)
    return {name: [one.get(name, "") for one in told] for name in names}

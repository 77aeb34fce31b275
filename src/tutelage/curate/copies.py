"""Who stays among equal and near-equal records of all sources, and what must leave training because it is held out.

Precedence: held-out records first, then training records, each in recipe order of their sources and then by row. The held-out
side therefore always wins; inside a side the first is kept. A training record leaks when its first request is that of a
held-out record (it can be, when that one's whole task is unseen), or when it is an equal or near copy of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from tutelage.curate import near
from tutelage.curate.spec import CurateSpec, NearSpec
from tutelage.records import Conversation, Verdict

_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """One record that takes part: where it is, and what it is equal by."""

    source: str
    row: int
    row_id: str
    turns_key: bytes
    prompt_key: bytes
    is_held_out: bool


@dataclass
class Copies:
    """All records that take part, added in recipe order with their text as it will be trained; `verdicts()` drops the copies.

    `conversation_at(source, row)` gives that text again: it is asked only about pairs that may be near.
    """

    spec: CurateSpec
    conversation_at: Callable[[str, int], Conversation]
    entries: list[Entry] = field(default_factory=list)
    _pending: list[str] = field(default_factory=list)
    _verdicts: dict[int, Verdict] = field(default_factory=dict)

    def add(self, conversation: Conversation, row: int, *, is_held_out: bool) -> None:
        """One more record, after all those before it."""
        where = conversation.where
        key = near.turns_key(conversation)
        self.entries.append(Entry(where.source, row, where.row_id, key, conversation.prompt_key, is_held_out))
        self._pending.append(near.conversation_text(conversation))
        if len(self._pending) >= _BATCH:
            self._shingle()

    def verdicts(self, advance: Callable[[int], None] = lambda amount: None) -> list[Verdict]:
        """One verdict per record that must go, in the order in which records were added."""
        self._verdicts = {}
        precedence = sorted(range(len(self.entries)), key=lambda i: not self.entries[i].is_held_out)
        heads = self._drop_equal(precedence)
        twins = [i for i in precedence if heads[i] != i and i not in self._verdicts]  # stay or go with their head
        self._drop_known_requests(precedence)
        self._drop_near([i for i in precedence if heads[i] == i and i not in self._verdicts], advance)
        for i in twins:
            if (of_head := self._verdicts.get(heads[i])) and i not in self._verdicts:
                self._verdicts[i] = replace(of_head, source=self.entries[i].source, row=self.entries[i].row)
        return [self._verdicts[i] for i in sorted(self._verdicts)]

    @cached_property
    def near_spec(self) -> NearSpec:
        """What near means: leaks are looked for even where near copies may stay."""
        return self.spec.near_duplicates or NearSpec()

    @cached_property
    def _sets(self) -> near.ShingleSets:
        return near.ShingleSets(self.near_spec.shingle_words)

    def _shingle(self) -> None:
        self._sets.add(self._pending)
        self._pending.clear()

    def _drop(self, i: int, kept: int, rule: str, reason: str) -> None:
        entry, other = self.entries[i], self.entries[kept]
        if other.is_held_out and not entry.is_held_out:
            rule, where = "leak", f"{other.row_id}, which is held out"
        else:
            where = f"{other.row_id}, which is kept"
        self._verdicts[i] = Verdict(entry.source, entry.row, rule, False, reason.format(where))

    def _drop_equal(self, precedence: list[int]) -> dict[int, int]:
        """The first record with the same turns, for every record; the others go, if they may not stay."""
        first: dict[bytes, int] = {}
        heads = {i: first.setdefault(self.entries[i].turns_key, i) for i in precedence}
        for i, head in heads.items():
            is_leak = self.entries[head].is_held_out and not self.entries[i].is_held_out
            if i != head and (is_leak or self.spec.exact_duplicates == "drop"):
                self._drop(i, head, "exact_duplicate", "the same turns as {}")
        return heads

    def _drop_known_requests(self, precedence: list[int]) -> None:
        held_out: dict[bytes, int] = {}
        for i in precedence:
            entry = self.entries[i]
            if entry.is_held_out:
                held_out.setdefault(entry.prompt_key, i)
            elif entry.prompt_key in held_out and i not in self._verdicts:
                self._drop(i, held_out[entry.prompt_key], "leak", "the same request as {}")

    def _drop_near(self, heads: list[int], advance: Callable[[int], None]) -> None:
        """Near copies; where copies may stay, only those of held-out records go."""
        may_stay = self.spec.near_duplicates is None
        entries = [self.entries[i] for i in heads]
        if may_stay and not any(entry.is_held_out for entry in entries):
            return
        self._shingle()

        @lru_cache(maxsize=1024)
        def answers(i: int) -> near.Hashes:
            text = near.answer_text(self.conversation_at(entries[i].source, entries[i].row))
            return near.hash_shingles([text], self.near_spec.shingle_words)[0]

        found = near.find_copies(
            near.Entrants(
                self._sets.take(heads).without_common(),
                answers,
                judged=lambda i: not (may_stay and entries[i].is_held_out),
                joins=lambda i: entries[i].is_held_out or not may_stay,
            ),
            self.near_spec,
            advance,
        )
        for i, copy in found.items():
            # Cut, not rounded: "0.80" must not be said of 0.799, nor "1.00" of records that differ.
            similarity = f"{int(copy.similarity * 100) / 100:.2f}"
            self._drop(
                heads[i],
                heads[copy.of],
                "near_duplicate",
                f"{similarity} alike to {{}}; copies from {self.near_spec.threshold:g}",
            )

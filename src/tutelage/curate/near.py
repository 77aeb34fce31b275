"""Equal and near-equal records.

Two records are near copies when, at the threshold or above, the Jaccard similarity (shared / all) holds twice over: of the word
shingles of the whole conversation, requests and answers, and of those of its learned answers. The second keeps apart two
questions about one long passage. A shingle found in more than `COMMON_RECORDS` records is template text (a task definition,
"Is the claim above correct?") and does not count, or every instance of a templated task would be a copy of the first.

MinHash with locality-sensitive hashing (`rensa`) proposes pairs; the exact similarity decides. Records are taken in order of
precedence and compared with those kept so far: a record goes only when it is that near to a record that *stays*, so a chain of
small differences does not swallow what is far from its head, and who is a copy depends on nothing but the order.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash, RMinHashLSH

from tutelage.curate.spec import NearSpec
from tutelage.records import Conversation, Turn

COMMON_RECORDS = 10
"""A shingle in more records than this is template text."""

_SEED = 20_240_229
_STANDARD_ERRORS = 4.0
_FIND_PROBABILITY = 0.99
_BATCH = 2_048
_CJK = re.compile(r"[぀-ヿ㐀-䶿一-鿿가-힯豈-﫿]|[^\s぀-ヿ㐀-䶿一-鿿가-힯豈-﫿]+")

Hashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Copy:
    """Record `of` (an index) stays, and this one is its copy at this similarity."""

    of: int
    similarity: float


def turns_key(conversation: Conversation) -> bytes:
    """16 bytes that are equal for records with equal turns and tools, whatever their source, task or licence."""
    parts = [conversation.tools or ""]
    for turn in conversation.turns:
        parts += [turn.role, turn.content, turn.reasoning or "", turn.tool_calls or "", turn.name or "", turn.call_id or ""]
        parts.append("" if turn.weight is None else repr(float(turn.weight)))
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)  # lengths, or "a" + "bc" would equal "ab" + "c"
    return digest.digest()


def conversation_text(conversation: Conversation) -> str:
    """Everything said, in order, one part per line."""
    return "\n".join(_said(turn) for turn in conversation.turns)


def answer_text(conversation: Conversation) -> str:
    """What the model is to learn to say: assistant turns, without those whose learn weight is 0."""
    return "\n".join(_said(turn) for turn in conversation.turns if turn.role == "assistant" and turn.weight != 0)


def _said(turn: Turn) -> str:
    return "\n".join(part for part in (turn.reasoning, turn.content, turn.tool_calls) if part)


def shingles(text: str, shingle_words: int) -> list[str]:
    """Runs of `shingle_words` words, case folded; a shorter text is one shingle, so it is near only to itself.

    >>> shingles("To be or  not to be", 5)
    ['to be or not to', 'be or not to be']
    >>> shingles("Yes, please.", 5)
    ['yes, please.']

    Words are what white space parts; of Chinese, Japanese and Korean each character is a word.
    """
    folded = text.casefold()
    words = folded.split() if text.isascii() else _CJK.findall(folded)
    if len(words) <= shingle_words:
        return [" ".join(words)]
    return [" ".join(run) for run in zip(*(words[i:] for i in range(shingle_words)), strict=False)]


def hash_shingles(texts: Iterable[str], shingle_words: int) -> list[Hashes]:
    """Sorted 64-bit hashes of each text's distinct shingles; the same in every process."""
    hashed = RMinHash.hash_token_sets([shingles(text, shingle_words) for text in texts])
    return [np.unique(np.array(hashes, np.uint64)) for hashes in hashed]


@dataclass
class ShingleSets:
    """Sets of shingle hashes, 8 bytes per shingle, added a batch at a time; `[i]` is one set, sorted."""

    shingle_words: int
    _sets: list[Hashes] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._sets)

    def __getitem__(self, index: int) -> Hashes:
        return self._sets[index]

    def add(self, texts: Iterable[str]) -> None:
        """Appends one set per text."""
        self._sets += hash_shingles(texts, self.shingle_words)

    def take(self, indices: Iterable[int]) -> ShingleSets:
        """These sets, in this order."""
        return ShingleSets(self.shingle_words, [self._sets[i] for i in indices])

    def without_common(self, max_records: int = COMMON_RECORDS) -> ShingleSets:
        """The sets without shingles of more than `max_records` records; a set that would be left empty stays whole."""
        every = np.concatenate([*self._sets, np.zeros(0, np.uint64)])
        values, counts = np.unique(every, return_counts=True)
        common = values[counts > max_records]
        kept = ShingleSets(self.shingle_words)
        for hashes in self._sets:
            rare = hashes[~_is_in(hashes, common)]
            kept._sets.append(rare if len(rare) else hashes)
        return kept


def _is_in(hashes: Hashes, values: Hashes) -> NDArray[np.bool_]:
    if not len(values):
        return np.zeros(len(hashes), bool)
    found: NDArray[np.bool_] = values[np.minimum(np.searchsorted(values, hashes), len(values) - 1)] == hashes
    return found


def jaccard(a: Hashes, b: Hashes) -> float:
    """Shared / all of two sorted sets.

    >>> jaccard(np.array([1, 2, 3], np.uint64), np.array([2, 3, 4], np.uint64))
    0.5
    """
    num_shared = int(_is_in(a, b).sum())
    return num_shared / (len(a) + len(b) - num_shared)


def num_bands(threshold: float, num_permutations: int) -> int:
    """The fewest bands that find a pair at the threshold with probability 0.99 (Mining of Massive Datasets, 3.4.2).

    With b bands of r rows a pair at similarity s is proposed with probability 1 - (1 - s^r)^b: at 0.8, b=32 and r=4 give 1.00.

    >>> num_bands(0.8, 128), num_bands(1.0, 128)
    (32, 1)
    """
    choices = [b for b in range(1, num_permutations + 1) if num_permutations % b == 0]
    for b in choices:
        if 1 - (1 - threshold ** (num_permutations // b)) ** b >= _FIND_PROBABILITY:
            return b
    return num_permutations


def _always(index: int) -> bool:
    return True


@dataclass(frozen=True)
class Entrants:
    """The records to compare, in order of precedence, and who may do what.

    `answers` gives the shingles of a record's answers and is asked only about proposed pairs; a record that is not `judged`
    stays unasked; what stays and `joins` is compared with all that follow.
    """

    sets: ShingleSets
    answers: Callable[[int], Hashes]
    judged: Callable[[int], bool] = _always
    joins: Callable[[int], bool] = _always

    def similarity(self, i: int, j: int, threshold: float) -> float:
        """Of the whole conversations, or 0.0 when the answers are less alike than the threshold."""
        whole = jaccard(self.sets[i], self.sets[j])
        return whole if whole >= threshold and jaccard(self.answers(i), self.answers(j)) >= threshold else 0.0


def find_copies(entrants: Entrants, spec: NearSpec, advance: Callable[[int], None] = lambda amount: None) -> dict[int, Copy]:
    """The records that are near copies of one that stays, by index. Among several that stay, the first is named."""
    margin = _STANDARD_ERRORS * math.sqrt(spec.threshold * (1 - spec.threshold) / spec.num_permutations)
    least = spec.threshold - margin  # of the estimate: it spares the exact similarity of what only shares a band
    index = RMinHashLSH(spec.threshold, spec.num_permutations, num_bands(spec.threshold, spec.num_permutations))
    stayed: dict[int, RMinHash] = {}
    copies: dict[int, Copy] = {}
    for start in range(0, len(entrants.sets), _BATCH):
        batch = range(start, min(start + _BATCH, len(entrants.sets)))
        for i, signature in zip(batch, _signatures([entrants.sets[i] for i in batch], spec.num_permutations), strict=True):
            proposed = sorted(index.query(signature)) if entrants.judged(i) else []
            likely = (j for j in proposed if signature.jaccard(stayed[j]) >= least)
            near = (Copy(j, entrants.similarity(i, j, spec.threshold)) for j in likely)
            if found := next((copy for copy in near if copy.similarity), None):
                copies[i] = found
            elif entrants.joins(i):
                index.insert(i, signature)
                stayed[i] = signature
        advance(len(batch))
    return copies


def _signatures(sets: Sequence[Hashes], num_permutations: int) -> list[RMinHash]:
    tokens = [[data[i : i + 8] for i in range(0, len(data), 8)] for data in (hashes.tobytes() for hashes in sets)]
    signatures: list[RMinHash] = RMinHash.from_token_sets(tokens, num_permutations, _SEED)
    return signatures

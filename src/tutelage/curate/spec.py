"""What a recipe can say about cleaning: rules that drop, flag or rewrite, and copies."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tutelage.spec import ByKind, Many, Share, Spec


class StripBoilerplate(Spec):
    """Removes preambles ("Sure!", "As an AI ...,") and closings ("I hope this helps!") from answers. Nothing is dropped."""

    kind: Literal["strip_boilerplate"] = "strip_boilerplate"
    preambles: bool = True
    """Strip opening phrases."""
    closings: bool = True
    """Strip closing phrases."""


class Length(Spec):
    """Drops records whose request or answer is too short or too long, in white-space words."""

    kind: Literal["length"] = "length"
    min_instruction_words: int = Field(default=1, ge=0)
    """Words in the first user turn, at least."""
    min_response_words: int = Field(default=1, ge=0)
    """Words in all assistant turns together, at least."""
    max_response_words: int = Field(default=1000, ge=1)
    """Words in all assistant turns together, at most."""


class Repetition(Spec):
    """Drops answers in which sentences repeat: 1 - distinct sentences / sentences."""

    kind: Literal["repetition"] = "repetition"
    max_share: Share = 0.3
    """The largest share of repeated sentences that is kept."""
    min_sentences: int = Field(default=4, ge=2)
    """Answers with fewer sentences are not judged."""


class Refusal(Spec):
    """Flags (or drops) answers that refuse the request."""

    kind: Literal["refusal"] = "refusal"
    action: Literal["flag", "drop"] = "flag"
    """`flag` keeps and counts them."""


Rule = Annotated[Annotated[StripBoilerplate | Length | Repetition | Refusal, Field(discriminator="kind")], ByKind]


class NearSpec(Spec):
    """Near-duplicates: pairs proposed by MinHash over word shingles, decided by their exact similarity."""

    threshold: float = Field(default=0.8, gt=0.0, le=1.0)
    """Jaccard similarity of the whole conversation, and of its answers, from which two records are copies."""
    num_permutations: int = Field(default=128, ge=16)
    """MinHash permutations: more are slower and more exact (standard error about 1/sqrt(n))."""
    shingle_words: int = Field(default=5, ge=1)
    """Words per shingle."""


class CurateSpec(Spec):
    """Cleaning. Rules look at one record; copies are looked for across all sources."""

    rules: Many[Rule] = (Length(), Refusal())
    """In order; rewrites come first, so every verdict judges the text that will be trained."""
    exact_duplicates: Literal["drop", "keep"] = "drop"
    """Records with equal turns: the first is kept, or all."""
    near_duplicates: NearSpec | None = NearSpec()
    """Near copies within training are dropped, the first kept; null keeps them. Copies of held-out rows always leave training."""

"""Which weights a pattern names. Shell patterns over whole parts of dotted names, so that people need not know prefixes."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from tutelage.errors import did_you_mean


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` (`*`, `?`, `[0-9]`; case counts) covers a run of whole parts of the dotted `name`.

    >>> layer = "model.layers.1.mlp.up_proj.weight"
    >>> [matches(p, layer) for p in ("up_proj", "layers.[0-9].*", "layers.?", "mlp.*.weight", layer)]
    [True, True, True, True, True]
    >>> [matches(p, layer) for p in ("proj", "layers", "layer", "layers.[2-9].*", "up_proj.bias")]
    [False, True, False, False, False]
    >>> matches("layers.[0-9].*", "model.layers.12.mlp.up_proj.weight")    # one digit, and 12 has two
    False
    """
    return re.search(rf"(?:\A|\.){_expression(pattern)}(?:\.|\Z)", name) is not None


def _expression(pattern: str) -> str:
    """The pattern as a regular expression without the anchors that `fnmatch` adds."""
    whole = fnmatch.translate(pattern)
    start, end = whole.index(":") + 1, whole.rindex(")")
    return f"(?:{whole[start:end]})"


def nearest(pattern: str, names: Sequence[str]) -> str:
    """A half-sentence with the part of a name that is nearest to a pattern which matches nothing.

    >>> nearest("embed_token", ["model.embed_tokens.weight", "model.norm.weight"])
    'did you mean `embed_tokens`?'
    """
    parts = {part for name in names for part in name.split(".") if not part.isdecimal()}
    whole = did_you_mean(pattern, parts)
    return whole if whole.startswith("did") or len(parts) <= 12 else f"a weight here is called `{names[0]}`"

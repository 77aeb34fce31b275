"""Preambles and closings that say nothing about the request, cut from answers.

Conservative on purpose: a phrase is cut only where it opens or ends the answer as a sentence of its own; what is left is an
exact slice of the text; an answer is never emptied; code blocks, letters and scripted dialogues are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tutelage.curate.spec import StripBoilerplate
from tutelage.records import Conversation, Rewrite

# White space up to the next text, but never the indentation of the line that follows: it may be code.
_GAP = r"(?:[ \t]*(?:\r?\n[ \t]*)*\r?\n|[ \t]+)"
_ACKNOWLEDGE = r"(?:sure(?: thing)?|certainly|of course|absolutely|definitely|no problem)"
_INSIDE = r"(?:(?![.!?]\s)[^\n:`])"  # anything of the same sentence before a colon

_LEAD_IN = re.compile(
    rf"\s*{_ACKNOWLEDGE}[!.,]\s+(?:here(?:['’]s| is| are)|below (?:is|are)|the following (?:is|are))\b{_INSIDE}{{0,160}}"
    rf"(?::{_GAP}|[.!][ \t]*\r?\n(?:[ \t]*\r?\n)*)",
    re.IGNORECASE,
)
# Without a lead-in, only words that are never the answer to a yes/no question ("Of course!", "Absolutely!" can be).
_BARE = re.compile(rf"\s*(?:sure(?: thing)?|certainly|great question|good question)!{_GAP}", re.IGNORECASE)
_HAPPY = re.compile(
    rf"\s*(?:{_ACKNOWLEDGE}[!.,]\s+)?I(?:['’]d| would|['’]ll| will|['’]m| am)(?: be)? (?:happy|glad|delighted) to (?:help|assist)"
    rf"(?: you)?(?: out)?(?: with (?:that|this))?[!.]{_GAP}",
    re.IGNORECASE,
)
_AS_AN_AI = re.compile(
    r"\s*as an? (?:AI|artificial intelligence)(?: language)?(?: model)?(?: assistant)?"
    r"(?: (?:developed|created|trained|made) by [A-Z]\w+)?,[ ](?=(?-i:I\b))",
    re.IGNORECASE,
)

_SMILE = r"(?:\s?(?::-?\)|😊|🙂|😀|☺️?))?"
_HOPE = (
    r"(?:I )?(?:do )?hope (?:that |this |these |it |all )*"
    r"(?:(?:information|answer|explanation|example|overview|tips?|suggestions?) )?"
    r"(?:helps?|helped|(?:is|was|are|were|has been|will be) (?:of )?(?:help|helpful|useful)"
    r"|(?:answers|clarifies|clears up) (?:your|the|things))"
    r"\b[^.!?\n]{0,60}[.!]+"
)
_IF_YOU = r"(?:(?:and )?if (?:you|there|anything)\b[^.!?\n]{0,80}, ?)"
_ASK = r"(?:(?:feel free|do(?:n['’]t| not) hesitate) to (?:ask|reach out|contact me|let me know))"
_KNOW = (
    rf"(?:{_IF_YOU}(?:please |just |then )*(?:let me know|{_ASK})"
    rf"|(?:please |just )*(?:let me know (?:if|should|whether) you\b|{_ASK}))"
    r"[^.!?\n]{0,150}[.!]+"
)
_CLOSING = re.compile(rf"(?P<gap>\s+)(?:{_HOPE}|{_KNOW}){_SMILE}\s*\Z", re.IGNORECASE)
_WE = re.compile(r"\b(?:we|us|our)\b", re.IGNORECASE)
_TAIL_CHARACTERS = 400
_SENTENCE_ENDS = frozenset(".!?:)]}\"'”’*_`>")
_LETTER = re.compile(
    r"^[\s>\"“]*(?:dear|hi|hello|hey|greetings|good (?:morning|afternoon|evening)|subject ?:)\b", re.IGNORECASE | re.MULTILINE
)
_SPEAKER = re.compile(r"[\s*\"“-]*[A-Z][\w .'’-]{0,30}:\**\s")


def rewrites_of(conversation: Conversation, row: int, rules: tuple[StripBoilerplate, ...]) -> Iterator[Rewrite]:
    """The rewrites that the rules make of one record's assistant turns, in the order in which they apply."""
    for index, turn in enumerate(conversation.turns):
        if turn.role != "assistant":
            continue
        before = turn.content
        for rule in rules:
            after = strip_boilerplate(before, preambles=rule.preambles, closings=rule.closings)
            if after != before:
                yield Rewrite(conversation.where.source, row, index, rule.kind, before, after)
                before = after


def strip_boilerplate(text: str, *, preambles: bool = True, closings: bool = True) -> str:
    r"""The slice of `text` without opening and closing phrases; `text` itself when nothing would be left.

    >>> strip_boilerplate("Certainly, here is a haiku:\n\nAn old silent pond\n\nI hope this helps!")
    'An old silent pond'
    >>> strip_boilerplate("As an AI language model, I have no taste.")
    'I have no taste.'
    >>> strip_boilerplate("Sure!")
    'Sure!'
    >>> strip_boilerplate("Dear Ann,\nthe cat is fine.\nLet me know if you miss her.")
    'Dear Ann,\nthe cat is fine.\nLet me know if you miss her.'

    Stripping again changes nothing. The white space between a phrase and the rest goes with the phrase.
    """
    while True:
        start = preamble_length(text) if preambles else 0
        stop = len(text) - (closing_length(text) if closings else 0)
        if text[start:stop].strip():
            after = text[start:stop]
        else:  # each alone may still leave something
            after = next((kept for kept in (text[start:], text[:stop]) if kept.strip()), text)
        if after == text:
            return text
        text = after


def preamble_length(text: str) -> int:
    """How many characters at the start are an opening phrase, 0 when it cannot be cut for certain.

    >>> preamble_length("Sure! Paris."), preamble_length("Sure! if you like"), preamble_length("Sure, I can.")
    (6, 0, 0)
    """
    if found := _LEAD_IN.match(text):
        phrase, rest = found.group(), text[found.end() :].lstrip()
        is_quote_open = phrase.count('"') % 2 == 1 or phrase.count("“") != phrase.count("”")
        # On the same line, lower case goes on with the sentence: "here are the two kinds: red and blue."
        goes_on = "\n" not in phrase[len(phrase.rstrip()) :] and rest[:1].islower()
        return 0 if is_quote_open or goes_on or not rest else found.end()
    for pattern in (_HAPPY, _BARE, _AS_AN_AI):
        if found := pattern.match(text):
            rest = text[found.end() :].lstrip()
            return found.end() if rest and not rest[0].islower() else 0
    return 0


def closing_length(text: str) -> int:
    """How many characters at the end are a closing phrase and the white space before it, 0 when it cannot be cut for certain.

    >>> closing_length("It is 4. I hope this helps!"), closing_length("print('I hope this helps!')")
    (19, 0)
    """
    tail_start = max(0, len(text) - _TAIL_CHARACTERS)
    found = _CLOSING.search(text, tail_start)
    if not found:
        return 0
    if _WE.search(found.group()):  # somebody speaks for a company: the answer is a letter or an announcement
        return 0
    start, gap = found.start(), found["gap"]
    last_line = gap.rpartition("\n")[2]
    if start == 0 or not ("\n" in gap or text[start - 1] in _SENTENCE_ENDS):
        return 0
    is_indented = "\n" in gap and (len(last_line) >= 4 or "\t" in last_line)
    line = text[text.rfind("\n", 0, start) + 1 : start]
    is_in_code = text.count("```", 0, start) % 2 == 1
    if is_indented or is_in_code or ("\n" not in gap and _SPEAKER.match(line)) or _LETTER.search(text):
        return 0
    return len(text) - start

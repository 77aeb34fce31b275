"""Rules that look at one record and say keep, flag or drop, with the number and the bound."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tutelage.curate.spec import Length, Refusal, Repetition, Rule, StripBoilerplate
from tutelage.records import Conversation, Verdict


def judge(conversation: Conversation, row: int, rules: Sequence[Rule]) -> Iterator[Verdict]:
    """What the judging rules say of one record, in order, up to and including the first that drops it."""
    for rule in rules:
        match rule:
            case Length():
                reason, keep = length_reason(conversation, rule), False
            case Repetition():
                reason, keep = repetition_reason(conversation, rule), False
            case Refusal():
                reason, keep = refusal_reason(conversation), rule.action == "flag"
            case StripBoilerplate():
                continue  # a rewrite: it was applied before any judging
        if reason is not None:
            yield Verdict(conversation.where.source, row, rule.kind, keep, reason)
            if not keep:
                return


def length_reason(conversation: Conversation, rule: Length) -> str | None:
    """Why the record is too short or too long, in white-space words; None when it is neither.

    Reasoning is not counted; tool calls are, so that a turn that only calls a tool is not an empty answer.
    """
    first_user = next((turn.content for turn in conversation.turns if turn.role == "user"), "")
    num_request = len(first_user.split())
    num_answer = sum(
        len(t.content.split()) + len((t.tool_calls or "").split()) for t in conversation.turns if t.role == "assistant"
    )
    if num_request < rule.min_instruction_words:
        return f"{_words(num_request)} in the request; at least {rule.min_instruction_words:,}"
    if num_answer < rule.min_response_words:
        return f"{_words(num_answer)} in the answer; at least {rule.min_response_words:,}"
    if num_answer > rule.max_response_words:
        return f"{_words(num_answer)} in the answer; at most {rule.max_response_words:,}"
    return None


def _words(count: int) -> str:
    return f"{count:,} word{'' if count == 1 else 's'}"


def repetition_reason(conversation: Conversation, rule: Repetition) -> str | None:
    """Why an answer repeats itself too much; None when no assistant turn does. Each turn is judged alone, songs never."""
    for turn in conversation.turns:
        if turn.role != "assistant" or len(_SENTENCE_END.findall(turn.content)) + 1 < rule.min_sentences:
            continue  # the cheap upper bound spares most short answers
        found = sentences(turn.content)
        num_repeats = len(found) - len(set(found))
        if len(found) < rule.min_sentences or num_repeats <= rule.max_share * len(found) or _CHORUS.search(turn.content):
            continue
        share = num_repeats / len(found)
        return f"{num_repeats:,} of {len(found):,} sentences repeat an earlier one ({share:.0%}); at most {rule.max_share:.0%}"
    return None


_FENCED = re.compile(r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1[^\n]*$|\Z)", re.MULTILINE | re.DOTALL)
_CODE_START = re.compile(
    r"\s*(?:[<#]\w|</|//|/\*|\\\w|@\w|\||[\w.\[\]\"']+\s*[-+*/]?=\s)"
    r"|(?:def|class|import|from|return|else|elif|if|for|while|try|except|public|private|var|let|const|SELECT|INSERT|UPDATE)\b.*[:;(){}=]"
)
_CALL_END = re.compile(r"\w\([^ ]*.*\)\s*:?$")
_MIN_SENTENCE_WORDS = 3
_CLOSING_PUNCTUATION = " .!?…。！？\"'”’)]*"
_LETTER = re.compile(r"[^\W\d_]")
_SENTENCE_END = re.compile(r"[\n.!?…。！？]")
_CHORUS = re.compile(r"^\W*(?:pre-?|final |repeat )?(?:chorus|refrain)\b", re.IGNORECASE | re.MULTILINE)
_MARKER = re.compile(r"^\s*(?:[-*•+>#]+|\(?\d{1,3}[.):]|\(?[a-zA-Z][.)])\s+")
_BREAK = re.compile(  # the punctuation first: a search for one of few characters is fast, look-behinds are not
    r"[.!?…](?<![ .][A-Za-z]\.)(?<!\b[MD][rs]\.)(?<!\bSt\.)(?<!\bvs\.)(?<!\bMrs\.)(?<!\betc\.)(?<!e\.g\.)(?<!i\.e\.)"
    r"[\"'”’)\]*]*\s+|[。！？]"
)


def sentences(text: str) -> list[str]:
    r"""The sentences of prose, folded for comparison: case, spacing, list markers and closing punctuation do not count.

    >>> sentences("1. Mix the eggs. Bake it all!\n2. Mix  the eggs.\n```\nx = f(1)\n```\nYes.")
    ['mix the eggs', 'bake it all', 'mix the eggs']

    Every line ends a sentence, so items of a list are sentences. What repeats by nature is left out: code (fenced blocks and
    lines that look like code), and anything under three words, such as the labels of a list or the cells of a table.
    """
    found = []
    for line in _FENCED.sub("", text).split("\n"):
        if _is_code(line):
            continue
        for piece in _BREAK.split(_MARKER.sub("", line, count=1)):
            words = piece.casefold().split()
            sentence = " ".join(words).strip(_CLOSING_PUNCTUATION)
            if len(words) >= _MIN_SENTENCE_WORDS and _LETTER.search(sentence):
                found.append(sentence)
    return found


def _is_code(line: str) -> bool:
    bare = line.rstrip()
    if not bare or bare[-1] in ";{}\\":
        return True
    if line.startswith(("    ", "\t")) and not _MARKER.match(line):
        return True
    return bool(_CODE_START.match(line)) or (bare.endswith((")", "):")) and bool(_CALL_END.search(bare)))


_CANNOT = r"(?:can(?:['’]?t|not| not)|could(?:n['’]t| not)|(?:am|['’]m) (?:unable|not able) to|won['’]t|will not)"
_DO = (
    r"(?:help(?! but)|assist|provide|fulfil|comply|answer|respond|generate|create|write|produce|process|access|browse|discuss"
    r"|engage|support|offer|complete|do (?:that|this)|continue|participate|recommend|give (?:you|medical|legal|advice|any)"
    r"|share|display|view|determine|perform|execute|open|search|see (?:the|any|your)|be able to (?:help|assist|provide))"
)
_SORRY = (
    r"(?:(?:I['’]m|I am) (?:very |so |really )?sorry|sorry|(?:I )?apologi[sz]e|my apologies|unfortunately|I['’]m afraid)"
    r"[^.!?\n]{0,40}?[,.:;]? (?:but )?(?:that )?"
)
_AI = r"as an? (?:AI|artificial intelligence|language model|digital assistant|virtual assistant)[^,.\n]{0,60}, "
_LACK = (
    r"(?:do(?:n['’]t| not) have (?:access|the (?:ability|capability|capacity)|personal (?!experience)|feelings|emotions"
    r"|enough (?:information|context))"
    r"|do(?:n['’]t| not) (?:possess|experience)|lack the (?:ability|capability))"
)
_REFUSAL = re.compile(
    rf"[\s\"“*]*(?:(?:{_SORRY})(?:{_AI})?I ?(?:{_CANNOT} {_DO}|{_LACK})"
    rf"|{_AI}I ?(?:{_CANNOT}\b|{_LACK})|I ?{_CANNOT} (?:in good conscience |ethically )?{_DO}|I {_LACK}"
    r"|(?:this|the) (?:request|instruction|task|question) (?:can(?:not|['’]t)|is not (?:possible|appropriate)|goes against))",
    re.IGNORECASE,
)


def refusal_reason(conversation: Conversation) -> str | None:
    """How the first answer that refuses opens; None when none does. Only openings count: stories may refuse further on."""
    for turn in conversation.turns:
        if turn.role == "assistant" and (found := _REFUSAL.match(turn.content)):
            return f"the answer opens with “{found.group().strip()}”"
    return None

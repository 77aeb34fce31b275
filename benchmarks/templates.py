"""Every chat template that you have, on random conversations: what is proved, what is refused and why, and any mismatch.

    python benchmarks/templates.py                                          # the templates of tests/render/templates
    python benchmarks/templates.py --templates FILE.jsonl.zst --tokenizers FOLDER --examples 40 --check

FILE holds one JSON object per line with `name` and `template`. Each template meets a byte-level and a SentencePiece-like
tokenizer that know its markers; each tokenizer folder with a template of its own meets that one with five times as many
conversations. `apply_chat_template` of transformers is the judge (see tests/render/template_sweep.py for the promises).

A template counts as proved when it shows a plain conversation in full and every plain conversation that it accepts is proved.
`--check` fails on any mismatch, and when fewer than 95 % of the templates that show every turn are proved.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
OWN = HERE.parent / "tests" / "render" / "templates"
PAGE = HERE.parent / "docs" / "templates.md"
KINDS = ("bytes", "pieces")
NATIVE_SHARE = 5
BAR = 0.95
FACTS = {
    "keeps_prefix": "a conversation's first turns render to a prefix of the whole, generation prompt included",
    "appends_header": "a header for another answer always follows",
    "prints_date": "print the day",
    "trims": "trim white space around texts",
    "content_as_parts": "show contents only as lists of parts",
    "refuses_system": "refuse a system turn",
    "drops_system": "leave a system turn out in silence",
    "drops_reasoning": "leave the last answer's reasoning out",
    "drops_earlier_reasoning": "leave earlier reasoning out",
    "refuses_tools": "refuse tool calls or results",
    "hides_tools": "leave tool calls out",
}
HEAD = """\
# Chat templates

What is promised of every template, and checked here on random conversations (system turns or none, reasoning, tools, other
alphabets, the template's own markers inside texts) with `apply_chat_template` of transformers as the judge:

* the ids are the same;
* with `special_tokens_in_content: text` no special token is left inside content, and nothing else changes;
* every learned turn is one stretch, reads as the template shows it, and ends with one stop;
* or the conversation is refused, with the cause.

Written by `make templates`; how it is done stands in [decisions.md](decisions.md) and in `src/tutelage/render/provenance.py`.
"""


@dataclass
class Result:
    """One template with one tokenizer. `outcomes` counts conversations; `plain` only those without tools and reasoning."""

    name: str
    tokenizer: str
    shows_all: bool = False
    refused: str = ""
    appends_eos: bool = False
    outcomes: dict[str, int] = field(default_factory=dict)
    plain: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    mismatches: list[str] = field(default_factory=list)

    @property
    def is_proved(self) -> bool:
        """Every plain conversation that the template accepts is proved, and there is one."""
        others = set(self.plain) - {"proved", "template_refuses"}
        return not self.refused and not self.mismatches and not others and self.plain.get("proved", 0) > 0


def sweep(name: str, template: str | None, tokenizer: str, examples: int) -> Result:
    """The result of so many conversations."""
    from render.template_sweep import draw_many, open_case, shows_all, verify
    from tutelage.errors import TemplateError

    result = Result(name, tokenizer if tokenizer in KINDS else Path(tokenizer).name)
    try:
        result.shows_all = template is None or shows_all(template)
        case = open_case(name, template, tokenizer)
    except TemplateError as error:
        result.refused = str(error)
        return result
    result.facts, result.appends_eos = case.facts, case.appends_eos
    chats = draw_many(examples, case.facts["markers"], random_seed=len(case.template))
    outcomes, plain = Counter[str](), Counter[str]()
    for chat, outcome in zip(chats, _verified(lambda some: verify(case, some), chats, result), strict=True):
        if outcome is not None:
            outcomes[outcome] += 1
            plain[outcome] += not any(turn.tool_calls or turn.reasoning for turn in chat.turns)
    result.outcomes, result.plain = dict(outcomes), dict(+plain)
    return result


def _verified(verify: Callable[[list[Any]], list[str]], chats: list[Any], result: Result) -> list[str | None]:
    """The outcomes, all at once; one by one when a promise is broken, to say where."""
    try:
        return list(verify(chats))
    except Exception as error:  # noqa: BLE001 - a crash is a finding too
        if len(chats) > 1:
            return [outcome for chat in chats for outcome in _verified(verify, [chat], result)]
        result.mismatches.append(f"{result.name} ({result.tokenizer}): {type(error).__name__}: {error}")
        return [None]


def read_templates(path: Path | None) -> list[tuple[str, str]]:
    """Names and texts of a file, or of our own."""
    if path is None:
        return [(file.stem, file.read_text(encoding="utf-8")) for file in sorted(OWN.glob("*.jinja"))]
    data = _unpacked(path) if path.suffix == ".zst" else path.read_bytes()
    rows = [json.loads(line) for line in data.decode().split("\n") if line]
    odd = next((number for number, row in enumerate(rows, 1) if not {"name", "template"} <= row.keys()), None)
    if odd is not None:
        raise SystemExit(f"{path}:{odd}: a line needs `name` and `template`, found {', '.join(rows[odd - 1]) or 'nothing'}")
    return [(row["name"], row["template"]) for row in rows]


def native_folders(folder: Path | None, work: Path) -> list[Path]:
    """Tokenizer folders that bring a template; packed ones (tokenizer.json.zst) are unpacked below `work`."""
    from tutelage.render.tokenizer import open_tokenizer

    found = []
    for config in sorted(folder.rglob("tokenizer_config.json")) if folder is not None else []:
        path = config.parent
        if (packed := path / "tokenizer.json.zst").exists():
            path = Path(shutil.copytree(path, work / path.name, ignore=shutil.ignore_patterns("*.zst")))
            (path / "tokenizer.json").write_bytes(_unpacked(packed))
        if (path / "tokenizer.json").exists() and "default" in open_tokenizer(path).templates:
            found.append(path)
    return found


def _unpacked(path: Path) -> bytes:
    import zstandard

    data: bytes = zstandard.ZstdDecompressor().stream_reader(path.read_bytes()).read()
    return data


def run_all(templates: Sequence[tuple[str, str]], natives: Sequence[Path], *, examples: int, jobs: int) -> Iterator[Result]:
    """Every pair, in several processes, in order."""
    tasks = [(name, text, kind, examples) for name, text in templates for kind in KINDS]
    tasks += [(f"{path.name} (its own tokenizer)", None, str(path), examples * NATIVE_SHARE) for path in natives]
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(sweep, *zip(*tasks, strict=True), chunksize=8)


# --- the page


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """The totals: templates (a template is what it is with its worse tokenizer), conversations by outcome, mismatches."""
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.name, []).append(result)
    usable = {name: each for name, each in by_name.items() if not any(result.refused for result in each)}
    showing = [name for name, each in by_name.items() if all(result.shows_all for result in each)]
    proved = [name for name in showing if all(result.is_proved for result in by_name[name])]
    return {
        "templates": len(by_name),
        "usable": len(usable),
        "showing": len(showing),
        "proved": len(proved),
        "share": len(proved) / max(len(showing), 1),
        "unproved": {name: _why_not(by_name[name]) for name in showing if name not in proved},
        "not_showing": sorted(set(usable) - set(showing)),
        "appends_eos": sum(any(result.appends_eos for result in each) for each in usable.values()),
        "outcomes": dict(sum((Counter(result.outcomes) for result in results), Counter[str]()).most_common()),
        "facts": {fact: sum(bool(each[0].facts.get(fact)) for each in usable.values()) for fact in FACTS},
        "refused": _by_cause(results),
        "mismatches": [text for result in results for text in result.mismatches],
    }


def _why_not(results: Sequence[Result]) -> str:
    causes = [result.refused.rpartition(": ")[2] for result in results if result.refused]
    causes += [name for result in results for name in result.plain if name not in ("proved", "template_refuses")]
    causes += ["mismatch" for result in results if result.mismatches]
    return ", ".join(dict.fromkeys(causes)) or "no plain conversation was accepted"


def _by_cause(results: Sequence[Result]) -> dict[str, list[str]]:
    causes: dict[str, list[str]] = {}
    for result in results:
        if result.refused and result.tokenizer != KINDS[1]:
            cause = result.refused.removeprefix("the chat template refuses a plain exchange of a question and an answer: ")
            causes.setdefault(cause.removeprefix("the chat template refuses this conversation: "), []).append(result.name)
    return causes


def section(title: str, found: dict[str, Any], *, examples: int) -> str:
    """The part of the page about one set of templates."""
    total = sum(found["outcomes"].values())
    lines = [
        f"## {title}",
        "",
        f"{found['templates']} templates, {total:,} conversations ({examples} for each template and tokenizer), "
        f"**mismatches: {len(found['mismatches'])}**. {found['showing']} templates show every turn of a plain conversation; "
        f"**{found['proved']} of these ({found['share']:.1%}) are proved** on every plain conversation that they accept. "
        f"{found['appends_eos']} write no stop and need `append_eos`.",
        "",
        "| outcome | conversations |",
        "| --- | ---: |",
        *(f"| {outcome} | {count:,} |" for outcome, count in found["outcomes"].items()),
        "",
        "| of the usable templates, so many | |",
        "| --- | ---: |",
        *(f"| {words} | {found['facts'][fact]} |" for fact, words in FACTS.items()),
        "",
    ]
    lines += _listed("Shown in full but not proved", [f"{name} ({cause})" for name, cause in sorted(found["unproved"].items())])
    lines += _listed("Usable, but showing only some turns", found["not_showing"])
    for cause, names in sorted(found["refused"].items(), key=lambda item: -len(item[1])):
        lines += _listed(f"Refused: {cause}", names)
    return "\n".join(lines)


def _listed(title: str, names: Sequence[str]) -> list[str]:
    return [f"**{title}** ({len(names)}): {', '.join(names)}.", ""] if names else []


def put_on_page(page: str, key: str, text: str) -> str:
    """The page with this section in place of the one of the same key, or at the end."""
    start, end = f"<!-- {key} -->\n", f"<!-- end of {key} -->\n"
    made = f"{start}{text}{end}"
    if start in page:
        before, _, rest = page.partition(start)
        return before + made + rest.partition(end)[2]
    return f"{page}\n{made}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", type=Path, help="JSON lines with name and template, perhaps .zst (default: our own)")
    parser.add_argument("--tokenizers", type=Path, help="a folder of tokenizer folders; those with a template are swept too")
    parser.add_argument("--examples", type=int, default=40, help="conversations for each template and tokenizer")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, help="writes every result there")
    parser.add_argument("--check", action="store_true", help="fails on a mismatch, or below the bar")
    parser.add_argument("--quick", action="store_true", help="every tenth template of a file, eight conversations each")
    parser.add_argument("--page", action="store_true", help="puts the result on docs/templates.md")
    options = parser.parse_args()
    templates = read_templates(options.templates)
    if options.quick:
        options.examples = 8
        templates = templates[::10] if options.templates else templates
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        natives = native_folders(options.tokenizers, Path(work))
        results = list(run_all(templates, natives, examples=options.examples, jobs=options.jobs))
    found = summarise(results)
    title = "Templates of public models" if options.templates else "Templates of the tests, one for each behaviour"
    text = section(title, found, examples=options.examples)
    print(text, f"{time.perf_counter() - began:.0f} s", *found["mismatches"], sep="\n")
    if options.page:
        page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else HEAD
        PAGE.write_text(put_on_page(page, "public" if options.templates else "own", text), encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps({"summary": found, "results": [asdict(result) for result in results]}, indent=1))
    is_low = bool(options.templates) and found["share"] < BAR
    return int(options.check and (bool(found["mismatches"]) or is_low))


if __name__ == "__main__":
    sys.exit(main())

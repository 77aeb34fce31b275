"""Writes the generated pages: docs/recipe.md, its JSON Schema, the README's map. `--check` says whether they are up to date."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

from tutelage.recipe import Recipe, json_schema

DOCS = Path(__file__).parent
README = DOCS.parent / "README.md"
CODE = DOCS.parent / "src" / "tutelage"
MAP_START, MAP_END = "<!-- map: written by `make docs` -->\n", "<!-- end of map -->"
OTHER_FILES = {
    "page.html.j2": "the report's skeleton; every string in it is escaped",
    "page.css": "its looks: light, dark, print, 400 to 1600 px",
    "page.js": "its conveniences; the page is whole without them",
    "macros.html.j2": "tables, figures and pictures with legends, for all pages",
    "plan.html.j2": "the skeleton of the plan's page",
    "plan_section.html.j2": "promises, pictures, lengths, coverage: in the plan's page and in the report",
    "browse.html.j2": "the skeleton of the page to browse examples; their data travels packed",
    "browse.css": "its looks: light, dark, 320 to 1600 px",
    "browse.js": "unpacks, weighs by any policy as the plan does, lists, draws what is in sight",
}
HEAD = """\
# The recipe

One YAML file says all that a run depends on. It is read strictly: unknown keys are refused with the nearest known one,
every mistake is listed at once with file and line, and scalars follow YAML 1.2 (`1e-5` is a number, `no` is a word).

* `--set mix.rates.temperature=3` overrides a value on the command line; lists are indexed, `curate.rules.0.length...`.
* `from: base.yaml` takes everything that this file does not say from a base recipe (one level).
* A section that has a `kind` can be written `equal`, `{length: {...}}` or `{kind: temperature, temperature: 3}`.
* Relative paths start at the recipe's own folder.
* `tutelage check RECIPE --resolved` prints every value with its origin; the same text is kept beside each run.
* Editors complete recipes with `# yaml-language-server: $schema=recipe.schema.json` as the first line.

This page is generated from the schema by `make docs`.
"""


def page() -> str:
    """The whole page as Markdown."""
    schema = json_schema()
    definitions = schema["$defs"]
    lines = [HEAD, "## Top level\n", *_table(schema, definitions)]
    done: set[str] = set()
    for name, info in Recipe.model_fields.items():
        for definition in _definitions(schema["properties"][name], definitions):
            _section(name, definition, definitions, lines, done)
        assert info.description, f"{name} has no description"
    return "\n".join(lines) + "\n"


def _section(path: str, definition: str, definitions: dict[str, Any], lines: list[str], done: set[str]) -> None:
    if definition in done or "properties" not in definitions[definition]:  # any JSON value, say
        return
    done.add(definition)
    body = definitions[definition]
    kind = body["properties"].get("kind", {}).get("const")
    lines += [f"\n## `{path}`" + (f": `{kind}`" if kind else ""), "", body.get("description", "").split("\n\n")[0], ""]
    lines += _table(body, definitions)
    for name, value in body["properties"].items():
        for inner in _definitions(value, definitions):
            _section(f"{path}.{name}", inner, definitions, lines, done)


def _table(body: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    rows = ["| key | what | default |", "|---|---|---|"]
    for name, value in body["properties"].items():
        if name == "kind":
            continue
        default = "**required**" if name in body.get("required", ()) else f"`{_default(value)}`" if "default" in value else ""
        # pydantic leaves out a description that its definition repeats
        text = value.get("description") or definitions[_definitions(value, definitions)[0]]["description"].split("\n\n")[0]
        text = " ".join(text.split()) + _choices(value)
        rows.append(f"| `{name}` | {text} | {default} |".replace("<", "&lt;"))
    return rows if len(rows) > 2 else ["No keys."]


def _choices(value: dict[str, Any]) -> str:
    for part in [value, *value.get("anyOf", ())]:
        if "enum" in part:
            return " One of: " + ", ".join(f"`{choice}`" for choice in part["enum"]) + "."
    return ""


def _default(value: dict[str, Any]) -> str:
    default = value["default"]
    if isinstance(default, dict):
        return default.get("kind", "see below")
    if isinstance(default, list) and default and isinstance(default[0], dict):
        return "[" + ", ".join(entry["kind"] for entry in default) + "]"
    return json.dumps(default)


def _definitions(value: Any, definitions: dict[str, Any]) -> list[str]:
    """The definitions that a property refers to, however deep."""
    if isinstance(value, dict):
        own = [value["$ref"].rpartition("/")[2]] if "$ref" in value else []
        inner = [part for key, part in value.items() if key not in ("$ref", "discriminator")]
        return own + [name for part in inner for name in _definitions(part, definitions)]
    return [name for inner in value for name in _definitions(inner, definitions)] if isinstance(value, list) else []


def readme() -> str:
    """The README with its map of the code made anew: one line per file, the first sentence of its docstring."""
    before, _, rest = README.read_text().partition(MAP_START)
    _, _, after = rest.partition(MAP_END)
    suffixes = (".py", ".j2", ".css", ".js")
    files = sorted(path for path in CODE.rglob("*") if path.suffix in suffixes and path.name != "__init__.py")
    rooms = [path.parent for path in files if path.parent != CODE]
    lines: list[str] = []
    for folder in [CODE, *dict.fromkeys(rooms)]:
        lines += ["", f"{folder.relative_to(CODE.parent)}/   {_first_sentence(folder / '__init__.py')}"]
        lines += [f"  {path.relative_to(CODE).as_posix():<26} {_first_sentence(path)}" for path in files if path.parent == folder]
    return before + MAP_START + "```text" + "\n".join(lines) + "\n```\n" + MAP_END + after


def _first_sentence(path: Path) -> str:
    if path.name in OTHER_FILES:
        return OTHER_FILES[path.name]
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc, f"{path} has no docstring"
    return doc.splitlines()[0].rstrip(".")


def main() -> int:
    """Writes the pages, or with --check returns 1 when one is out of date."""
    schema = json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"
    pages = {DOCS / "recipe.md": page(), DOCS / "recipe.schema.json": schema, README: readme()}
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    if "--check" in sys.argv:
        sys.stderr.write("".join(f"{path.name} is out of date: run `make docs`\n" for path in stale))
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The page of `tutelage look --html` in headless Chromium: its size, its first paint, and how long a switch of the loss takes.

    python benchmarks/look.py --quick            500 examples of the demonstration
    python benchmarks/look.py --check            all 3,600 of them too; exit code 1 over 3 MB, 1 s or 100 ms

A switch is timed inside the page, from the change of the selection to the end of a forced layout; `to frame` goes on to the
next frame that the browser has painted. Needs a Chromium on PATH.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "report"))

from report_browser import Browser, Page, find_browser  # noqa: E402

RECIPE = HERE.parent / "recipes" / "first.yaml"
WHOLE = ["mix.total_tokens=null", "mix.epochs=1", "render.max_tokens=2048"]
MOST_MB, MOST_PAINT_MS, MOST_SWITCH_MS = 3.0, 1000.0, 100.0
SHOWN = """new Promise((done) => {
  const ask = () => {
    const [mark] = performance.getEntriesByName("shown");
    return mark ? done(mark.startTime) : setTimeout(ask, 5);
  };
  ask();
})"""
PAINTED = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
SWITCH = """(async () => {
  const select = document.getElementById("policy"), times = [];
  for (let round = 0; round < 4; round++) for (const option of select.options) {
    const start = performance.now();
    select.value = option.value;
    select.dispatchEvent(new Event("change"));
    document.body.getBoundingClientRect();
    const done = performance.now();
    await new Promise((painted) => requestAnimationFrame(() => setTimeout(painted)));
    times.push([done - start, performance.now() - start]);
  }
  return times;
})()"""


def main() -> int:
    options = read_options()
    if find_browser() is None:
        print("no Chromium found on PATH; install one (Debian: apt install chromium)")
        return 1
    with tempfile.TemporaryDirectory(prefix="look-") as folder, Browser() as browser:
        pages = make_pages(Path(folder), options)
        result = {name: measure(browser, path) | {"MB": path.stat().st_size / 1e6} for name, path in pages.items()}
    for name, measured in result.items():
        print(f"{name}: " + ", ".join(f"{key} {value:,.2f}" for key, value in measured.items()))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1))
    return 1 if options.check and not all(map(is_good, result.values())) else 0


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The page of `tutelage look --html`: size, first paint, switch of the loss.")
    parser.add_argument("--recipe", default=str(RECIPE), help="whose examples are shown (the demonstration)")
    parser.add_argument("--number", type=int, default=500, help="examples on the page")
    parser.add_argument("--quick", action="store_true", help="without the page of all examples")
    parser.add_argument("--json", metavar="FILE", help="writes everything that was measured")
    parser.add_argument("--check", action="store_true", help="exit code 1 over 3 MB, a first paint of 1 s, a switch of 100 ms")
    return parser.parse_args()


def make_pages(folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """The page that `look --html` writes by itself, and unless it shall be quick, one with every planned example."""
    import tutelage
    from tutelage import looking

    overrides = WHOLE if Path(options.recipe) == RECIPE else []
    file = tutelage.load_recipe(options.recipe, overrides=overrides)
    done = tutelage.run(file, until="plan", store=folder / "store", runs=folder / "runs")
    numbers = {f"{options.number} examples": options.number} | ({} if options.quick else {"every example": sys.maxsize})
    pages = {name: folder / f"{number}.html" for name, number in numbers.items()}
    for name, path in pages.items():
        looking.write_page(file, done, looking.Wanted(number=numbers[name]), path)
    return pages


def measure(browser: Browser, path: Path) -> dict[str, float]:
    """Milliseconds: first contentful paint, first example shown, a switch (the worst, the median), and on to the next frame."""
    page = browser.open(path, width=1600)
    shown = ask(page, SHOWN)
    page.evaluate("document.getElementById('sort').value = 'longest'; relist(false); show(now.order[0])")
    times = ask(page, SWITCH)
    switches, frames = zip(*times[len(times) // 4 :], strict=True)  # the first round warms the page up
    num_tokens = page.evaluate("data.tokens.length")
    assert page.problems == [], page.problems
    return {
        "tokens": num_tokens,
        "first paint ms": page.evaluate(PAINTED),
        "first example ms": shown,
        "switch ms, worst": max(switches),
        "switch ms, median": median(switches),
        "to frame ms, worst": max(frames),
    }


def ask(page: Page, expression: str) -> Any:
    body = {"expression": expression, "returnByValue": True, "awaitPromise": True}
    return page.browser.call("Runtime.evaluate", body, page)["result"]["value"]


def is_good(measured: dict[str, float]) -> bool:
    is_quick = measured["first paint ms"] <= MOST_PAINT_MS and measured["switch ms, worst"] <= MOST_SWITCH_MS
    return measured["MB"] <= MOST_MB and is_quick and measured["first example ms"] <= MOST_PAINT_MS


if __name__ == "__main__":
    sys.exit(main())

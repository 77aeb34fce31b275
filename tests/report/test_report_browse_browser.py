"""The page to browse examples, in a real browser. Skipped only where no Chromium is installed."""

import json
import time

import numpy as np
import pytest
from report_browse_fakes import BYTES, POLICIES, RULES, hostile_examples, planned, random_examples
from report_browser import Browser, find_browser

from tutelage.looking import STANDARD_RULES, policies
from tutelage.plan.spec import InstructionModelling, KindWeights, PromptWeight
from tutelage.plan.weights import weigh_tokens
from tutelage.records import Kind
from tutelage.report.browse import render_browse

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium found on PATH: the page is not opened for real")

RANDOM = random_examples(60)
TEXT = " Héllo ✓ 中文|\n\tx  y\u00a0z🙂" * 3
LONG = "word " * 3000
LAST_TURN = (
    KindWeights(weights={"assistant": 0.6, "user": 0.3, "stop": 2.0, "scaffold": 0.7, "tool_call": 1.1}, turns="last"),
    InstructionModelling(turns="last"),
    PromptWeight(prompt_weight=0.2, turns="last"),
)
SHOWN = """new Promise((done) => {
  const isReady = () => performance.getEntriesByName("shown").length || !document.getElementById("trouble").hidden;
  const ask = () => isReady() ? done(document.getElementById("trouble").textContent) : setTimeout(ask, 5);
  ask();
})"""
FRAME = "new Promise((done) => requestAnimationFrame(() => setTimeout(done)))"
KEYS = {"j": 74, "k": 75, "ArrowDown": 40, "ArrowUp": 38, "ArrowRight": 39, "ArrowLeft": 37, "Escape": 27}
PER_TOKEN = """JSON.stringify(data.policies.map((policy) => {
  const found = weighRuns(policy), out = [];
  for (let example = 0; example < data.examples.name.length; example++)
    for (let run = data.firstRun[example]; run < data.firstRun[example + 1]; run++)
      for (let token = data.starts[run]; token < data.starts[run + 1]; token++)
        out.push(token === data.firstToken[example] ? 0 : found[run]);
  return out;
}))"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("browse")
    texts = [
        planned(TEXT, task="odd"),
        planned(LONG, place=1, row_id="s/f.jsonl:2"),
        planned("short text", place=2, row_id="s/f.jsonl:30"),
    ]
    for name, examples in (("random", RANDOM), ("texts", texts), ("hostile", hostile_examples())):
        page = render_browse(examples, POLICIES, BYTES, title=name, num_planned=len(examples))
        (made / f"{name}.html").write_text(page, encoding="utf-8")
    rules = [policy for rule in LAST_TURN for policy in policies(rule)[:1]] + policies(STANDARD_RULES[0])
    page = render_browse(RANDOM, rules, BYTES, title="rules", num_planned=len(RANDOM))
    (made / "rules.html").write_text(page, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


def promised(page, expression):
    """What a promise of the page gives."""
    body = {"expression": expression, "returnByValue": True, "awaitPromise": True}
    return page.browser.call("Runtime.evaluate", body, page)["result"].get("value")


def opened(browser, path, **more):
    page = browser.open(path, **more)
    assert promised(page, SHOWN) == ""
    return page


def press(page, key):
    for kind in ("keyDown", "keyUp"):
        body = {"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        page.browser.call("Input.dispatchKeyEvent", body | ({"text": key} if kind == "keyDown" and len(key) == 1 else {}), page)


def choose(page, name, value):
    """Sets a control as a person does."""
    event = "change" if name == "policy" else "input"
    page.evaluate(
        f"{{const e = document.getElementById('{name}'); e.value = {json.dumps(value)}; e.dispatchEvent(new Event('{event}'))}}"
    )


def names(page):
    """The listed examples, in order."""
    return page.evaluate("now.order.map((example) => data.examples.name[example])")


def weights_of(rule, examples):
    """What training gives every token, end to end: the plan's own rule; the first token of an example is never a target."""
    out = []
    for example in examples:
        rendered = example.rendered
        weights = weigh_tokens(rendered.kinds, loss=rule, turns=rendered.turns, turn_weights=rendered.turn_weights)
        weights = weights * np.float32(example.multiplier)
        weights[:1] = 0.0
        out.append(weights)
    return np.concatenate(out)


@pytest.mark.parametrize("name", ["random", "texts", "hostile"])
def test_the_page_opens_without_a_complaint_and_asks_for_nothing(browser, folder, name):
    """Kills: a digest that does not fit its text, a style that the policy refuses, anything fetched, a string read as markup."""
    page = opened(browser, folder / f"{name}.html")
    assert page.problems == []
    assert page.requests == [(folder / f"{name}.html").as_uri()]
    assert page.evaluate("document.images.length") == 0


def test_the_page_gives_every_token_the_weight_that_training_gives_it(browser, folder):
    """Kills: a rule of the page's own: double precision, turns off by one, a last turn without learned tokens, a trained first token."""
    page = opened(browser, folder / "rules.html")
    found = json.loads(page.evaluate(PER_TOKEN))
    for rule, weights in zip((*LAST_TURN, *STANDARD_RULES), found, strict=True):
        np.testing.assert_array_equal(np.array(weights, np.float32), weights_of(rule, RANDOM), err_msg=rule.kind)
        assert np.array(weights).astype(np.float32).tolist() == weights, "weights are f32"


def test_the_totals_are_counted_anew_for_every_policy(browser, folder):
    """Kills: totals of the first policy that stay, first tokens counted, shares of tokens instead of weight."""
    page = opened(browser, folder / "random.html")
    kinds, turns = (np.concatenate([getattr(example.rendered, name) for example in RANDOM]) for name in ("kinds", "turns"))
    kinds[(kinds == Kind.SCAFFOLD) & (turns >= 0)] = len(Kind)  # marks
    tasks = np.repeat([example.task for example in RANDOM], [len(example.rendered.ids) for example in RANDOM])
    for number, rule in enumerate(RULES):
        choose(page, "policy", str(number))
        weights = weights_of(rule, RANDOM)
        assert page.evaluate("totals.all.trained") == (weights > 0).sum()
        assert page.evaluate("totals.kinds.map((sum) => sum.trained)") == [
            int((weights[kinds == kind] > 0).sum()) for kind in range(9)
        ]
        sums = dict(page.evaluate("[...totals.tasks].map(([name, sum]) => [name, sum.weight])"))
        assert sums == pytest.approx({task: float(weights[tasks == task].sum(dtype=np.float64)) for task in sorted(set(tasks))})
        shown = page.evaluate("[...document.querySelectorAll('#tasks tbody tr')].map((row) => row.cells[3].textContent)")
        assert shown == [str((weights[tasks == task] > 0).sum()) for task in sorted(set(tasks))]


def test_switching_the_policy_recolours_the_tokens_in_place(browser, folder):
    """Kills: a switch that only changes the numbers, or that draws the text anew and loses the place of whoever reads it."""
    page = opened(browser, folder / "texts.html")
    page.evaluate("window.kept = document.querySelector('[data-place=\"5\"]')")
    asked = "[kept.isConnected, kept.parentElement.className, document.getElementById('line').textContent]"
    choose(page, "policy", "1")
    assert page.evaluate(asked) == [True, "run k-user w-none", "loss: response"]
    choose(page, "policy", "3")
    assert page.evaluate(asked) == [True, "run k-user w-full", "loss: full"]
    assert page.evaluate("document.querySelector('[data-place=\"0\"]').parentElement.className") == "run k-user w-none"


def test_a_weight_typed_in_makes_a_loss_of_its_own(browser, folder):
    """Kills: an input that nothing listens to, that loses the caret, or whose recipe line is another loss."""
    page = opened(browser, folder / "texts.html")
    page.evaluate("document.getElementById('totals').open = true")
    page.evaluate(
        "{const e = document.querySelector('[data-kind=\"2\"]'); e.focus(); e.value = '0.1'; e.dispatchEvent(new Event('input', {bubbles: true}))}"
    )
    assert (
        page.evaluate("document.getElementById('line').textContent")
        == "loss: {weights: {scaffold: 0.7, user: 0.1, assistant: 1, stop: 2}}"
    )
    assert page.evaluate("[document.activeElement.dataset.kind, document.getElementById('policy').value]") == ["2", "own"]
    assert page.evaluate("weights[0]") == float(np.float32(0.1))
    page.evaluate(
        "{const e = document.querySelector('[data-kind=\"2\"]'); e.value = '-3'; e.dispatchEvent(new Event('input', {bubbles: true}))}"
    )
    assert page.evaluate("weights[0]") == float(np.float32(0.1)), "a weight below 0 is no weight"
    assert page.evaluate("document.querySelector('[data-kind=\"2\"]').hasAttribute('aria-invalid')") is True


def test_the_tokens_on_the_page_join_to_the_text(browser, folder):
    """Kills: marks of white space that become text, a character shown twice, a byte of one that is not shown at all."""
    page = opened(browser, folder / "texts.html")
    assert page.evaluate("document.getElementById('tokens').textContent") == TEXT
    assert page.evaluate("document.querySelectorAll('.token').length") == len(TEXT.encode())
    assert page.evaluate("[...document.querySelectorAll('[data-part]')].slice(0, 4).map((e) => e.dataset.part)") == [
        "C3",
        "E2",
        "9C",
        "E4",
    ]
    assert page.evaluate("getComputedStyle(document.querySelector('.line'), '::before').content") == '"↵"'
    assert page.evaluate("document.querySelectorAll('.special').length") == 3


def test_what_hides_or_turns_text_around_is_spelled_out(browser, folder):
    """Kills: a direction override or a NUL that reaches the page."""
    page = opened(browser, folder / "hostile.html")
    assert page.evaluate("[...document.querySelectorAll('.hidden')].map((e) => e.dataset.code)") == [
        "U+202E",
        "U+200B",
        "␀",
        "U+2028",
        "␍",
    ]
    assert not set("\u202e\u200b\x00\u2028\r") & set(page.evaluate("document.body.textContent"))


def test_hovering_and_focus_say_id_token_kind_turn_and_weight(browser, folder):
    """Kills: a tip of the neighbour, a weight before the switch, a token that only a pointer reaches."""
    page = opened(browser, folder / "texts.html")
    page.evaluate("document.querySelector('[data-place=\"3\"]').dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))")
    tip = page.evaluate("document.getElementById('tip').innerText")
    assert "id 169, token 4 of" in tip and "user, turn 1 of 2" in tip and "weight 0.3" in tip and "bytes A9" in tip and "é" in tip
    page.evaluate("document.querySelector('[data-place=\"0\"]').focus()")
    assert "the first token is never trained" in page.evaluate("document.getElementById('tip').innerText")
    press(page, "ArrowRight")
    assert "token 2 of" in page.evaluate("document.getElementById('tip').innerText")
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "tip"
    press(page, "Escape")
    assert page.evaluate("document.getElementById('tip').hidden") is True


def test_only_what_can_be_seen_is_on_the_page(browser, folder):
    """Kills: a page that holds thousands of entries and tokens as elements, and one that never shows the rest."""
    page = opened(browser, folder / "texts.html", width=1600)
    page.evaluate("show(1)")
    for _ in range(10):
        promised(page, FRAME)
    drawn = page.evaluate("document.querySelectorAll('.token').length")
    assert 1500 <= drawn < 9000, "what the window holds and a little more"
    for _ in range(30):
        page.evaluate("document.querySelector('main').scrollTop = 1e6")
        promised(page, FRAME)
    assert page.evaluate("document.getElementById('tokens').textContent") == LONG
    assert page.evaluate("document.getElementById('more').hidden") is True
    listed = opened(browser, folder / "random.html").evaluate("document.querySelectorAll('.row').length")
    assert 5 < listed < 40


def test_lists_are_filtered_and_sorted(browser, folder):
    """Kills: a filter that looks at names only, an order of the first policy, ties that are not in plan order."""
    page = opened(browser, folder / "random.html")
    everything = [example.name for example in RANDOM]
    assert names(page) == everything
    choose(page, "task", "chat")
    assert names(page) == [example.name for example in RANDOM if example.task == "chat"]
    choose(page, "task", "")
    choose(page, "sort", "longest")
    assert names(page) == sorted(everything, key=lambda name: -len(RANDOM[everything.index(name)].rendered.ids))
    choose(page, "sort", "worst")
    for number, rule in enumerate(RULES):
        choose(page, "policy", str(number))
        share = {example.name: (weights_of(rule, [example]) > 0).mean() for example in RANDOM}
        assert names(page) == sorted(everything, key=share.__getitem__)
    wanted = bytes(RANDOM[7].rendered.ids[:3].tolist()).decode()
    choose(page, "find", wanted.upper())
    texts = {example.name: bytes(example.rendered.ids.tolist()).decode().lower() for example in RANDOM}
    assert set(names(page)) == {name for name, text in texts.items() if wanted.lower() in text or wanted.lower() in name}


def test_found_text_is_marked(browser, folder):
    """Kills: a search that says an example has the words and does not show where, deep in a long one either."""
    page = opened(browser, folder / "texts.html")
    choose(page, "find", "RT TE")
    assert names(page) == ["s/f.jsonl:30"]
    assert page.evaluate("[...document.querySelectorAll('.hit')].map((e) => e.textContent).join('')") == "rt te"


def test_keys_go_through_the_examples_and_the_address_leads_back(browser, folder):
    """Kills: keys that type into the search are taken for steps; an address that names another example, or an unknown one in silence."""
    page = opened(browser, folder / "texts.html")
    for key, name in (
        ("j", "s/f.jsonl:2"),
        ("j", "s/f.jsonl:30"),
        ("j", "s/f.jsonl:30"),
        ("k", "s/f.jsonl:2"),
        ("ArrowUp", "s/f.jsonl:1"),
    ):
        press(page, key)
        assert page.evaluate("document.getElementById('name').textContent") == name
    page.evaluate("document.getElementById('find').focus()")
    press(page, "j")
    assert page.evaluate("document.getElementById('find').value") == "j"
    choose(page, "find", "")
    page.evaluate("show(2)")
    assert promised(page, "new Promise((done) => setTimeout(() => done(location.hash), 300))") == "#s/f.jsonl:30"
    page.evaluate("location.hash = '#s/f.jsonl:2'")
    promised(page, FRAME)
    assert page.evaluate("document.getElementById('name').textContent") == "s/f.jsonl:2"
    page.evaluate("location.hash = '#s/f.jsonl:77'")
    promised(page, FRAME)
    assert "s/f.jsonl:77 is not on this page" in page.evaluate("document.getElementById('count').textContent")


@pytest.mark.parametrize("width", [320, 400, 1000, 1600])
def test_the_page_is_never_wider_than_the_window(browser, folder, width):
    """Kills: a long row id, a table or a word that makes the page scroll sideways."""
    for name in ("random", "texts", "hostile"):
        page = opened(browser, folder / f"{name}.html", width=width)
        page.evaluate("document.getElementById('totals').open = true")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name


CONTRAST = """(() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c; }
    return getComputedStyle(document.body).backgroundColor;
  };
  const low = [];
  for (const e of document.querySelectorAll('.token, .swatch, .quiet, .facts, .id, th, td, code, select, label')) {
    if (!e.getClientRects().length) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push([e.className, e.textContent.slice(0, 20), (a + 0.05) / (b + 0.05)]);
  }
  return JSON.stringify(low);
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_can_be_read_on_its_ground(browser, folder, dark):
    """Kills: faint text on a tint, a weight whose colour swallows its words, in either scheme."""
    page = opened(browser, folder / "random.html", dark=dark, width=1600)
    longest = max(range(len(RANDOM)), key=lambda i: (len(set(RANDOM[i].rendered.kinds)), len(set(RANDOM[i].rendered.turns))))
    page.evaluate(f"show({longest})")
    for colour in ("kind", "weight"):
        page.evaluate(f"document.querySelector('[value={colour}]').click()")
        assert json.loads(page.evaluate(CONTRAST)) == []


@pytest.mark.parametrize("lacking", ["DecompressionStream", "scripts"])
def test_a_browser_that_cannot_unpack_is_told_so(browser, folder, lacking):
    """Kills: an empty page that says nothing."""
    if lacking == "scripts":
        page = browser.open(folder / "texts.html", scripts=False)
        assert "switched off" in page.evaluate("document.querySelector('noscript').innerText")
        return
    page = browser.open(folder / "texts.html")
    page.browser.call("Page.addScriptToEvaluateOnNewDocument", {"source": "delete window.DecompressionStream"}, page)
    page.browser.call("Page.navigate", {"url": (folder / "hostile.html").as_uri()}, page)
    deadline = time.monotonic() + 20
    while "hostile" not in page.evaluate("location.href") and time.monotonic() < deadline:
        time.sleep(0.05)
    told = promised(page, SHOWN)
    assert "DecompressionStream" in told and page.evaluate("document.getElementById('app').hidden") is True

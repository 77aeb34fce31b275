"use strict";
// The page holds facts: for every example the kind and turn of its tokens. A loss policy is a table kind -> weight over them,
// so switching it goes over the runs of equal kind and turn and touches no text. `weighRuns` is the rule of plan/weights.py.
const ROW_PX = 54; // the height of a list entry, as the style sheet has it
const STEP_TOKENS = 1500; // tokens put on the page at once; more follow on the way down
const SCAFFOLD = 0, ASSISTANT = 3, MARK = 8; // a mark is scaffold that belongs to a turn: the model writes it
const $ = (id) => document.getElementById(id);
const count = (num) => num.toLocaleString("en-US");
const plural = (num, noun) => `${count(num)} ${noun}${num === 1 ? "" : "s"}`;
const percent = (part, whole) => `${whole ? ((100 * part) / whole).toFixed(part && part / whole < 0.1 ? 1 : 0) : 0} %`;
const spoken = (name) => name.replaceAll("_", " ");
const brief = (number) => String(Number(number.toPrecision(6)));

let data; // what `unpack` returned
let weights; // the weight of every run under the policy, f32
let totals; // what `tally` counted under the policy
const now = { policy: null, order: [], example: -1, drawn: 0, hits: null };

// ---- reading

async function inflate(text) {
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function varints(bytes) {
  const out = new Uint32Array(bytes.length);
  let num = 0, value = 0, unit = 1;
  for (const byte of bytes) {
    value += (byte & 127) * unit;
    unit *= 128;
    if (byte < 128) {
      out[num++] = value;
      value = 0;
      unit = 1;
    }
  }
  return out.subarray(0, num);
}

function unpack(bytes) {
  const length = new DataView(bytes.buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  const middle = 4 + length + head.num_bytes[0];
  const runs = readRuns(varints(bytes.subarray(middle)), head.examples.num_tokens);
  const policies = head.policies.map(([name, line, table, isLastOnly]) => ({ name, line, table, isLastOnly }));
  return { ...head, ...runs, policies, tokens: varints(bytes.subarray(4 + length, middle)), lowered: [] };
}

// starts (and the end), kindOf, turnOf: one entry per run; firstToken and firstRun: one per example, and the end.
function readRuns(flat, numTokens) {
  const num = flat.length / 3;
  const starts = new Uint32Array(num + 1), kindOf = new Uint8Array(num), turnOf = new Int32Array(num);
  for (let run = 0; run < num; run++) {
    starts[run + 1] = starts[run] + flat[3 * run];
    turnOf[run] = flat[3 * run + 2] - 1;
    kindOf[run] = flat[3 * run + 1] === SCAFFOLD && turnOf[run] >= 0 ? MARK : flat[3 * run + 1];
  }
  const firstToken = [0], firstRun = [0];
  for (let example = 0, run = 0; example < numTokens.length; example++) {
    firstToken.push(firstToken[example] + numTokens[example]);
    while (starts[run] < firstToken[example + 1]) run++;
    firstRun.push(run);
  }
  return { starts, kindOf, turnOf, firstToken, firstRun };
}

const textOf = (token) => data.vocabulary.texts[data.tokens[token]];

function textOfExample(example) {
  let text = "";
  for (let token = data.firstToken[example]; token < data.firstToken[example + 1]; token++) text += textOf(token);
  return text;
}

// ---- the policy

// The weight of each run in steps of 32 bits, as NumPy takes them: its kind's, times its turn's, times the example's.
function weighRuns(policy) {
  const table = Float32Array.from(policy.table), out = new Float32Array(data.kindOf.length);
  const { turn_weights, multiplier } = data.examples;
  for (let example = 0; example < multiplier.length; example++) {
    const last = policy.isLastOnly ? lastLearnedTurn(example) : null, byTurn = turn_weights[example];
    for (let run = data.firstRun[example]; run < data.firstRun[example + 1]; run++) {
      const turn = data.turnOf[run];
      let weight = last === null || turn === last || !isWritten(run) ? table[data.kindOf[run]] : 0;
      if (turn >= 0 && byTurn.length) weight = Math.fround(weight * Math.fround(byTurn[turn]));
      out[run] = weight * multiplier[example];
    }
  }
  return out;
}

const isLearned = (run) => data.learned.includes(data.kindOf[run]);
const isWritten = (run) => isLearned(run) || data.kindOf[run] === MARK;

function lastLearnedTurn(example) {
  let last = -2; // no turn at all
  for (let run = data.firstRun[example]; run < data.firstRun[example + 1]; run++) {
    if (isLearned(run)) last = Math.max(last, data.turnOf[run]);
  }
  return last;
}

// The tokens of a run that are targets: the first token of an example never is one.
const numTargets = (run, example) => data.starts[run + 1] - data.starts[run] - (run === data.firstRun[example] ? 1 : 0);
const nothing = () => ({ examples: 0, tokens: 0, trained: 0, weight: 0 });

function tally() {
  const { task } = data.examples;
  const tasks = new Map([...new Set(task)].sort().map((name) => [name, nothing()]));
  const out = { all: nothing(), kinds: data.kinds.map(nothing), tasks, examples: task.map(nothing) };
  for (let example = 0; example < task.length; example++) {
    tasks.get(task[example]).examples++;
    for (let run = data.firstRun[example]; run < data.firstRun[example + 1]; run++) {
      const targets = numTargets(run, example);
      for (const sum of [out.all, out.kinds[data.kindOf[run]], tasks.get(task[example]), out.examples[example]]) {
        sum.tokens += data.starts[run + 1] - data.starts[run];
        sum.trained += weights[run] > 0 ? targets : 0;
        sum.weight += weights[run] * targets;
      }
    }
  }
  return out;
}

function setPolicy(policy) {
  now.policy = policy;
  weights = weighRuns(policy);
  totals = tally();
  $("line").textContent = policy.line;
  if (!data.rowsOfKinds) makeTotals();
  showTotals();
  showLegend();
  if ($("sort").value === "worst") arrange();
  drawRows();
  showFacts();
  for (const element of $("tokens").children) element.className = runClass(Number(element.dataset.run), element.dataset.first === "");
}

function customPolicy() {
  const table = [...now.policy.table];
  for (const input of $("kinds").querySelectorAll("input")) {
    const isRight = input.value.trim() !== "" && Number.isFinite(input.valueAsNumber) && input.valueAsNumber >= 0;
    input.toggleAttribute("aria-invalid", !isRight);
    if (isRight) table[Number(input.dataset.kind)] = input.valueAsNumber;
  }
  table[MARK] = table[ASSISTANT];
  const said = table.slice(0, MARK).map((weight, kind) => [data.kinds[kind], weight]).filter(([, weight]) => weight > 0);
  const map = `weights: {${said.map(([kind, weight]) => `${kind}: ${brief(weight)}`).join(", ")}}`, isLastOnly = $("last").checked;
  return { name: "your own", line: `loss: {${isLastOnly ? `kind: weights, ${map}, turns: last` : map}}`, table, isLastOnly };
}

// ---- totals

// The rows are made once and filled for every policy, so that whoever types in one keeps the caret.
function addRow(table, head, numColumns) {
  const row = document.createElement("tr"), first = document.createElement("th");
  first.scope = "row";
  first.append(head);
  row.append(first);
  for (let column = 0; column < numColumns; column++) row.append(Object.assign(document.createElement("td"), { className: "n" }));
  const bar = document.createElement("span");
  bar.className = "share";
  row.append(document.createElement("td"));
  row.lastChild.append(bar, "");
  $(table).tBodies[0].append(row);
  return [...row.cells].slice(1);
}

function fillShare(cell, part, whole) {
  cell.firstChild.style.setProperty("--part", whole ? part / whole : 0);
  cell.lastChild.data = percent(part, whole);
}

function makeTotals() {
  data.rowsOfKinds = presentKinds().map((kind) => [kind, addRow("kinds", swatch(`k-${data.kinds[kind]}`, spoken(data.kinds[kind])), 3)]);
  data.rowsOfTasks = [...totals.tasks.keys()].map((name) => [name, addRow("tasks", name, 3)]);
  for (const [kind, cells] of data.rowsOfKinds) {
    if (kind === MARK) cells[1].append("as answers");
    if (kind === MARK) continue;
    const input = Object.assign(document.createElement("input"), { type: "number", min: 0, step: 0.1 });
    input.dataset.kind = kind;
    input.setAttribute("aria-label", `Weight of ${spoken(data.kinds[kind])} tokens`);
    cells[1].append(input);
  }
}

function showTotals() {
  const { all } = totals;
  $("sum").textContent = `${count(all.trained)} of ${plural(all.tokens, "token")} trained (${percent(all.trained, all.tokens)})`;
  for (const [kind, [tokens, weight, trained, share]] of data.rowsOfKinds) {
    const sum = totals.kinds[kind], input = weight.firstChild;
    tokens.textContent = count(sum.tokens);
    if (kind !== MARK && document.activeElement !== input) input.value = brief(Math.fround(now.policy.table[kind]));
    trained.textContent = count(sum.trained);
    fillShare(share, sum.weight, all.weight);
  }
  $("last").checked = now.policy.isLastOnly;
  for (const [name, [examples, tokens, trained, share]] of data.rowsOfTasks) {
    const sum = totals.tasks.get(name);
    examples.textContent = count(sum.examples);
    tokens.textContent = count(sum.tokens);
    trained.textContent = count(sum.trained);
    fillShare(share, sum.weight, all.weight);
  }
}

const presentKinds = () => data.kinds.map((_, kind) => kind).filter((kind) => totals.kinds[kind].tokens);

function swatch(name, text) {
  const element = document.createElement("span");
  element.className = `swatch ${name}`;
  element.textContent = text;
  return element;
}

const WEIGHT_STEPS = [["none", "weight 0"], ["faint", "below ½"], ["light", "½ to 1"], ["full", "1"], ["heavy", "above 1"]];

function showLegend() {
  const isByKind = !document.body.classList.contains("by-weight");
  const swatches = isByKind
    ? presentKinds().map((kind) => swatch(`run k-${data.kinds[kind]}`, spoken(data.kinds[kind])))
    : WEIGHT_STEPS.map(([step, text]) => swatch(`run w-${step}`, text));
  const note = isByKind ? "strong text is trained, faint text only read" : "weight in the loss";
  $("legend").replaceChildren(...swatches, swatch("quiet", note));
}

const step = (weight) => (weight <= 0 ? 0 : weight < 0.5 ? 1 : weight < 1 ? 2 : weight === 1 ? 3 : 4);
const weightOf = (run, isFirst) => (isFirst ? 0 : weights[run]);
const runClass = (run, isFirst) => `run k-${data.kinds[data.kindOf[run]]} w-${WEIGHT_STEPS[step(weightOf(run, isFirst))][0]}`;

// ---- the list

function arrange() {
  const { task, source, name, num_tokens } = data.examples;
  const wanted = $("find").value.toLowerCase(), chosen = [$("task").value, $("source").value];
  now.order = name.map((_, example) => example).filter((example) => {
    if ((chosen[0] && task[example] !== chosen[0]) || (chosen[1] && source[example] !== chosen[1])) return false;
    if (!wanted || name[example].toLowerCase().includes(wanted)) return true;
    return (data.lowered[example] ??= textOfExample(example).toLowerCase()).includes(wanted);
  });
  const share = (example) => totals.examples[example].trained / num_tokens[example];
  if ($("sort").value === "worst") now.order.sort((a, b) => share(a) - share(b) || a - b);
  if ($("sort").value === "longest") now.order.sort((a, b) => num_tokens[b] - num_tokens[a] || a - b);
  $("rows").style.height = `${now.order.length * ROW_PX}px`;
  $("count").textContent = now.order.length === name.length ? plural(name.length, "example") : `${count(now.order.length)} of ${plural(name.length, "example")}`;
}

// Only the entries in sight are elements, so ten thousand examples cost what ten do.
function drawRows() {
  const list = $("list"), first = Math.max(0, Math.floor(list.scrollTop / ROW_PX) - 4);
  const end = Math.min(now.order.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW_PX) + 4);
  const rows = [];
  for (let place = first; place < end; place++) rows.push(listRow(place));
  $("rows").replaceChildren(...rows);
  const active = rows.find((row) => row.getAttribute("aria-selected") === "true");
  if (active) list.setAttribute("aria-activedescendant", active.id);
  else list.removeAttribute("aria-activedescendant");
}

function listRow(place) {
  const example = now.order[place], { name, task, num_tokens } = data.examples, { trained, tokens } = totals.examples[example];
  const row = document.createElement("div");
  row.className = "row";
  row.id = `row-${example}`;
  row.style.transform = `translateY(${place * ROW_PX}px)`;
  row.dataset.example = example;
  row.title = name[example];
  for (const [key, value] of [["role", "option"], ["aria-selected", example === now.example], ["aria-posinset", place + 1], ["aria-setsize", now.order.length]]) {
    row.setAttribute(key, value);
  }
  const id = document.createElement("span"), cut = name[example].lastIndexOf(":");
  id.className = "id";
  id.append(swatch("head", name[example].slice(0, cut)), swatch("tail", name[example].slice(cut)));
  const facts = document.createElement("span");
  facts.className = "facts";
  const bar = document.createElement("span");
  bar.className = "share";
  bar.style.setProperty("--part", tokens ? trained / tokens : 0);
  facts.append(bar, `${percent(trained, tokens)} of ${plural(num_tokens[example], "token")}, ${task[example]}`);
  row.append(id, facts);
  return row;
}

function bringIntoSight(example) {
  const list = $("list"), top = now.order.indexOf(example) * ROW_PX;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + ROW_PX > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW_PX - list.clientHeight;
}

function relist(isOtherText) {
  arrange();
  $("list").scrollTop = 0;
  if (!now.order.includes(now.example) && now.order.length) show(now.order[0]);
  else {
    bringIntoSight(now.example);
    drawRows();
    if (isOtherText && now.example >= 0) redraw();
  }
}

function go(by) {
  const place = now.order.indexOf(now.example) + by;
  if (now.order.length) show(now.order[Math.min(Math.max(place, 0), now.order.length - 1)]);
}

// ---- one example

function show(example) {
  now.example = example;
  bringIntoSight(example);
  drawRows();
  redraw();
  tellAddress();
}

let addressTimer;
function tellAddress() {
  clearTimeout(addressTimer); // browsers refuse hundreds of changes in a row
  const name = data.examples.name[now.example];
  addressTimer = setTimeout(() => history.replaceState(null, "", `#${encodeURIComponent(name).replaceAll("%2F", "/").replaceAll("%3A", ":")}`), 150);
}

function showFacts() {
  if (now.example < 0) return;
  const e = data.examples, example = now.example, { tokens, trained, weight } = totals.examples[example];
  const facts = [e.task[example], plural(tokens, "token"), `${count(trained)} trained (${percent(trained, tokens)})`, `weight ${brief(weight)}`];
  facts.push(plural(e.num_turns[example], "turn"), `seen ${e.visits[example] === 1 ? "once" : `${count(e.visits[example])} times`}`);
  if (e.multiplier[example] !== 1) facts.push(`every weight times ${brief(e.multiplier[example])}`);
  $("name").textContent = e.name[example];
  $("says").textContent = facts.join(" · ");
}

function redraw() {
  hideTip();
  showFacts();
  now.drawn = 0;
  now.hits = findHits();
  $("tokens").replaceChildren();
  document.querySelector("main").scrollTop = 0;
  drawMore();
  while (now.hits.length && now.drawn < now.hits[0][1]) drawMore();
  const hit = $("tokens").querySelector(".hit"), main = document.querySelector("main");
  if (hit) main.scrollTop = hit.offsetTop - main.clientHeight / 2; // on narrow screens `main` does not scroll, and typing moves nothing
}

// Where the searched text stands, as [first, end) tokens counted from the example's first.
function findHits() {
  const wanted = $("find").value.toLowerCase(), hits = [], first = data.firstToken[now.example];
  if (!wanted) return hits;
  const ends = [];
  let length = 0;
  for (let token = first; token < data.firstToken[now.example + 1]; token++) ends.push((length += textOf(token).length));
  const text = textOfExample(now.example).toLowerCase();
  for (let at = text.indexOf(wanted), token = 0; at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
    while (token < ends.length && ends[token] <= at) token++;
    let end = token;
    while (end < ends.length && ends[end] < at + wanted.length) end++;
    hits.push([token, end + 1]);
  }
  return hits;
}

function drawMore() {
  const example = now.example, first = data.firstToken[example], total = data.firstToken[example + 1] - first;
  const end = Math.min(total, now.drawn + STEP_TOKENS), elements = [];
  for (let run = data.firstRun[example]; run < data.firstRun[example + 1]; run++) {
    const [from, to] = [Math.max(data.starts[run] - first, now.drawn), Math.min(data.starts[run + 1] - first, end)];
    if (from === 0 && to > 0) elements.push(runElement(run, 0, 1)); // the first token is never a target
    if (Math.max(from, 1) < to) elements.push(runElement(run, Math.max(from, 1), to));
  }
  $("tokens").append(...elements);
  if (now.drawn === 0) $("tokens").querySelector(".token")?.setAttribute("tabindex", 0);
  now.drawn = end;
  $("more").hidden = end === total;
  $("more").textContent = `Show the next ${count(Math.min(STEP_TOKENS, total - end))} of ${count(total - end)} more tokens`;
}

function runElement(run, from, to) {
  const element = document.createElement("span"), first = data.firstToken[now.example], kind = data.kindOf[run];
  element.className = runClass(run, from === 0);
  element.dataset.run = run;
  if (from === 0) element.dataset.first = "";
  const before = run > data.firstRun[now.example] ? data.kindOf[run - 1] : -1;
  const isStart = from === data.starts[run] - first || (from === 1 && data.starts[run] === first);
  if (isStart && kind !== before && kind !== SCAFFOLD) element.dataset.tag = spoken(data.kinds[kind]);
  for (let place = from; place < to; place++) element.append(tokenElement(place, first));
  return element;
}

function tokenElement(place, first) {
  const element = document.createElement("span"), entry = data.tokens[first + place], text = data.vocabulary.texts[entry];
  element.className = data.isSpecial.has(entry) ? "token special" : "token";
  if (now.hits.some(([from, to]) => from <= place && place < to)) element.className += " hit";
  element.dataset.place = place;
  element.tabIndex = -1;
  if (text) element.append(...visible(text));
  else element.dataset.part = data.vocabulary.bytes[entry] ?? "∅";
  return element;
}

// Text as nodes that join to it: white space marked, and whatever would hide or turn text around spelled out instead.
const PIECES = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\ufffe\uffff]| +|\n|\t|[^\S ])/;
function visible(text) {
  return text.split(PIECES).filter(Boolean).map((piece) => (PIECES.test(piece) ? mark(piece) : piece));
}

function mark(piece) {
  const element = document.createElement("i");
  element.className = { " ": "space", "\n": "line", "\t": "tab" }[piece[0]] ?? (/[^\S\r\u2028\u2029\ufeff]/.test(piece) ? "odd" : "hidden");
  if (element.className === "hidden") {
    const code = piece.codePointAt(0);
    element.dataset.code = code < 32 ? String.fromCodePoint(0x2400 + code) : `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
  } else element.textContent = piece;
  return element;
}

// ---- one token

function showTip(element) {
  const place = Number(element.dataset.place), entry = data.tokens[data.firstToken[now.example] + place];
  const run = Number(element.parentElement.dataset.run), turn = data.turnOf[run];
  const weight = weightOf(run, place === 0), bytes = data.vocabulary.bytes[entry];
  const text = document.createElement("code");
  text.append(...(data.vocabulary.texts[entry] ? visible(data.vocabulary.texts[entry]) : ["no whole character"]));
  const lines = [
    `id ${data.vocabulary.ids[entry]}${data.isSpecial.has(entry) ? ", special" : ""}, token ${count(place + 1)} of ${count(data.examples.num_tokens[now.example])}`,
    `${spoken(data.kinds[data.kindOf[run]])}, ${turn < 0 ? "in no turn" : `turn ${turn + 1} of ${data.examples.num_turns[now.example]}`}`,
    `weight ${brief(weight)}${place === 0 ? ": the first token is never trained" : ""}`,
  ];
  if (bytes) lines.push(`bytes ${bytes}, part of a character`);
  $("tip").replaceChildren(text, ...lines.map((line) => Object.assign(document.createElement("div"), { textContent: line })));
  placeTip(element);
  for (const other of $("tokens").querySelectorAll("[aria-describedby]")) other.removeAttribute("aria-describedby");
  element.setAttribute("aria-describedby", "tip");
}

function placeTip(element) {
  const tip = $("tip"), boxes = [...element.getClientRects()].sort((a, b) => b.width - a.width);
  const box = boxes[0] ?? element.getBoundingClientRect(); // the wider part of a token that a line's end divides
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const isBelow = box.bottom + height + 8 < window.innerHeight;
  tip.style.left = `${Math.max(4, Math.min(box.left, document.documentElement.clientWidth - width - 4))}px`;
  tip.style.top = `${isBelow ? box.bottom + 6 : Math.max(4, box.top - height - 6)}px`;
}

function hideTip() {
  $("tip").hidden = true;
}

// Scrolling takes the tip of the pointer away; a focused token keeps its own.
function keepTip() {
  const focused = document.activeElement;
  if (!$("tip").hidden && focused.classList.contains("token")) placeTip(focused);
  else hideTip();
}

function focusToken(from, by) {
  const place = Number(from.dataset.place) + by;
  if (place >= now.drawn && !$("more").hidden) drawMore();
  const next = $("tokens").querySelector(`[data-place="${place}"]`);
  if (!next) return;
  from.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

// ---- what people do

function listenToKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") hideTip();
    const { target } = event, isTyping = target.matches("select, input:not([type=radio])");
    const isToken = target.classList.contains("token"), isList = target === $("list") || target === document.body;
    const by = { j: 1, k: -1, ArrowDown: isList && 1, ArrowUp: isList && -1 }[event.key];
    const along = isToken && { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (isTyping || !(by || along)) return;
    event.preventDefault();
    if (along) focusToken(target, along);
    else go(by);
  });
}

function listenToTokens() {
  const tokens = $("tokens"), tokenAt = (event) => event.target.closest?.(".token");
  tokens.addEventListener("pointerover", (event) => (tokenAt(event) ? showTip(tokenAt(event)) : hideTip()));
  tokens.addEventListener("pointerleave", hideTip);
  tokens.addEventListener("focusin", (event) => tokenAt(event) && showTip(tokenAt(event)));
  tokens.addEventListener("focusout", hideTip);
  document.addEventListener("scroll", keepTip, { capture: true, passive: true });
  $("more").addEventListener("click", drawMore);
  const watch = new IntersectionObserver(([{ isIntersecting }]) => {
    if (!isIntersecting) return;
    drawMore();
    watch.unobserve($("more")); // it tells of changes only, and the button may still be in sight
    watch.observe($("more"));
  }, { rootMargin: "600px" });
  watch.observe($("more"));
}

function listen() {
  $("policy").addEventListener("change", () => setPolicy(data.policies[$("policy").value] ?? customPolicy()));
  for (const id of ["kinds", "last"]) {
    $(id).addEventListener("input", () => {
      $("policy").value = "own";
      setPolicy(customPolicy());
    });
  }
  for (const radio of document.querySelectorAll("[name=colour]")) {
    radio.addEventListener("change", () => {
      document.body.classList.toggle("by-weight", radio.value === "weight");
      showLegend();
    });
  }
  for (const id of ["find", "task", "source", "sort"]) $(id).addEventListener("input", () => relist(id === "find"));
  $("list").addEventListener("scroll", drawRows, { passive: true });
  $("list").addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row) show(Number(row.dataset.example));
  });
  new ResizeObserver(drawRows).observe($("list"));
  $("back").addEventListener("click", () => go(-1));
  $("on").addEventListener("click", () => go(1));
  window.addEventListener("hashchange", showNamed);
  listenToKeys();
  listenToTokens();
}

// The example that the address names, the first one otherwise; an unknown name is said.
function showNamed() {
  let name = location.hash.slice(1);
  try {
    name = decodeURIComponent(name);
  } catch { /* a lone % stands for itself */ }
  const example = data.examples.name.indexOf(name);
  if (name && example < 0) $("count").textContent += `; ${name} is not on this page`;
  if (example >= 0 && !now.order.includes(example)) {
    for (const id of ["find", "task", "source"]) $(id).value = "";
    arrange();
  }
  if (example >= 0) show(example);
  else if (now.example < 0) show(now.order[0]);
}

function addOptions(id, pairs) {
  $(id).append(...pairs.map(([value, text]) => new Option(text, value)));
}

function begin() {
  const { examples, policies } = data, names = (values) => [...new Set(values)].sort().map((name) => [name, name]);
  addOptions("policy", [...policies.map(({ name }, i) => [i, name + (i ? "" : " (this recipe)")]), ["own", "your own"]]);
  addOptions("task", [["", "all tasks"], ...names(examples.task)]);
  addOptions("source", [["", "all sources"], ...names(examples.source)]);
  $("sort").value = data.sort;
  $("about").textContent = `${count(examples.name.length)} of ${plural(data.num_planned, "planned example")}, as the model sees them`;
  $("app").hidden = false;
  $("totals").open = matchMedia("(min-width: 90rem)").matches;
  setPolicy(policies[0]);
  arrange();
  listen();
  showNamed();
  performance.mark("shown");
}

function fail(text) {
  $("trouble").textContent = text;
  $("trouble").hidden = false;
  $("about").textContent = "";
}

if (typeof DecompressionStream === "undefined") {
  fail("This browser cannot unpack the examples (it lacks DecompressionStream). Browsers since 2023 can: Chrome and Edge 80, Safari 16.4, Firefox 113.");
} else {
  inflate($("data").textContent).then((bytes) => {
    data = unpack(bytes);
    data.isSpecial = new Set(data.vocabulary.special);
    begin();
  }).catch((error) => fail(`The examples could not be unpacked: ${error}`));
}

// The page of a dataset: rows on the left, the text of one in the middle, what the teacher believed at a token on the right.
// Or beside the rows an overview: what the dataset holds of each domain, length and NLL, and what a choice leaves of it.
// Everything that came from the dataset is written as text (textContent), never as HTML.
"use strict";

const PAGE = 50;
const $ = id => document.getElementById(id);
const isServer = () => document.body.dataset.mode === "server";

// ---- Where values come from: the server, or the scripts of a folder.

const loading = new Map();
window.kdataLoaded = (name, value) => { loading.get(name).resolve(value); };

function fromFolder(name) {
  if (!loading.has(name)) {
    const one = {};
    one.value = new Promise((resolve, reject) => { one.resolve = resolve; one.reject = reject; });
    loading.set(name, one);
    const script = document.createElement("script");
    script.src = `data/${name}.js`;
    script.onerror = () => one.reject(new Error(`data/${name}.js is not there`));
    document.head.append(script);
  }
  return loading.get(name).value;
}

async function fromServer(name, words) {
  const own = state.about ? { state: state.about.state } : {};  // the rows as they were when this page was loaded
  const answer = await fetch(`/api/${name}?${new URLSearchParams({ ...own, ...words })}`, { headers: { "X-Kdata": "1" } });
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error.split("\n")[0]);
  return value;
}

async function rowsOfFolder() {
  const all = (await fromFolder("rows")).rows;
  const words = $("where").value.toLowerCase(), domain = $("domain").value, order = $("order").value;
  const sign = $("descending").checked ? -1 : 1;
  const left = all.filter(row => (!domain || row.domain === domain.slice(1)) &&
    (!words || `${row.id}\n${row.snippet}`.toLowerCase().includes(words)) && inBar(row[$("column").value]));
  const missing = value => value === null || value === undefined;
  if (order) left.sort((a, b) => missing(a[order]) - missing(b[order]) || sign * (a[order] - b[order]));
  return left;
}

// On lines of their own, so that a comment ends in its condition.
const joined = conditions => conditions.length > 1 ? conditions.map(one => `(\n${one}\n)`).join(" and ") : conditions.join();
const quoted = text => `'${text.replaceAll("'", "''")}'`;
// NAME.COLUMN, or a difference of two of them.
const name = column => column.split(" - ").map(term => term.split(".").map(part => `"${part}"`).join(".")).join(" - ");

function chosen() {
  const conditions = [];
  if ($("where").value.trim()) conditions.push($("where").value);
  if ($("domain").value) conditions.push(`domain = ${quoted($("domain").value.slice(1))}`);
  return conditions;
}

function words() {
  const plan = $("plan").value;
  return { plan: plan.slice(1), outside: plan.startsWith("-") ? "1" : "0" };
}

async function askRows(offset) {
  if (!isServer()) {
    const left = await rowsOfFolder();
    return { total: left.length, rows: left.slice(offset, offset + PAGE) };
  }
  const conditions = chosen();
  if (state.bar) {
    const [low, high, isLast] = state.bar, column = `(${name($("column").value)})::double`;
    conditions.push(isLast ? `${column} >= ${low}` : `${column} >= ${low} and ${column} < ${high}`);
  }
  return fromServer("rows", {
    ...words(), where: joined(conditions), order: $("order").value, descending: $("descending").checked ? "1" : "0",
    offset, limit: PAGE,
  });
}

async function askHistogram(column) {
  if (isServer()) return fromServer("histogram", { ...words(), column, where: joined(chosen()) });
  const values = rows => rows.map(row => row[column]).filter(Number.isFinite);
  const bar = state.bar;
  state.bar = null;  // bars show all rows of the other conditions
  const [all, own] = [values((await fromFolder("rows")).rows), values(await rowsOfFolder())];
  state.bar = bar;
  if (!all.length) return { edges: [], all: [], chosen: [], whole: false };
  const whole = column.startsWith("num_"), low = Math.min(...all), high = Math.max(...all);
  const width = whole ? Math.ceil((high - low + 1) / 40) : (high - low) / 40 || 1, bins = whole ? Math.floor((high - low) / width) + 1 : 40;
  const counts = rows => {
    const line = new Array(bins).fill(0);
    for (const value of rows) line[Math.min(bins - 1, Math.floor((value - low) / width))] += 1;
    return line;
  };
  return { whole, edges: Array.from({ length: bins + 1 }, (_, n) => whole && n === bins ? high + 1 : low + n * width), all: counts(all), chosen: counts(own) };
}

const askRow = (number, begin) => isServer() ? fromServer("row", { number, begin }) : fromFolder(`row-${number}-${begin}`);

// ---- What is shown now.

const state = { about: null, offset: 0, total: 0, rows: [], row: null, starts: [], token: -1, pinned: false, bar: null, asked: 0, askedRow: 0, askedOverview: 0 };
const inBar = value => !state.bar || (value >= state.bar[0] && (state.bar[2] || value < state.bar[1]));

const number = (value, digits = 3) => value === null || value === undefined ? "unknown" :
  Number.isInteger(value) ? value.toLocaleString("en-US") : String(Number(value.toPrecision(digits + 1)));
window.kdataNumber = number;  // for the tests
const percent = value => value === null ? "unknown" : value >= 0.1 ? `${(100 * value).toFixed(1)} %` :
  value >= 1e-5 ? `${(100 * value).toPrecision(2)} %` : `${(100 * value).toExponential(1)} %`;

// Signs that a person would not see, or that would turn the text around, as signs that one sees.
function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f]/g, sign => String.fromCharCode(0x2400 + sign.charCodeAt(0)))
    .replace(/\n/g, "\u23ce\n").replace(/\t/g, "\u21e5\t")
    .replace(/[\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g,
      sign => `\u2039U+${sign.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}\u203a`);
}

// A token in a table: spaces are seen, and a part of a character is told by its id.
function shownToken(text, id) {
  if (!text) return "\u2205";
  return /^\ufffd+$/.test(text) ? `\u2039${id}\u203a` : visible(text).replace(/^ +| +$/g, spaces => "\u2423".repeat(spaces.length));
}

// The name of a domain; one that has none can be seen, too.
const named = domain => visible(domain) || "(empty)";

// Parts of a line. Each keeps its direction to itself: an Arabic name turns no number beside it around.
function line(parts) {
  return parts.flatMap((part, n) => [...(n ? [" \u00b7 "] : []), element("bdi", visible(part))]);
}

function element(kind, text, parts = {}) {
  const one = document.createElement(kind);
  if (text !== null) one.textContent = text;
  for (const [key, value] of Object.entries(parts)) key === "class" ? one.className = value : one.setAttribute(key, value);
  return one;
}

function fill(select, values) {
  for (const [value, text] of values) select.append(element("option", text, { value }));
}

function complain(error) {
  $("error").textContent = error ? error.message : "";
  $("error").hidden = !error;
}

// ---- The list of rows.

async function showRows(offset = 0) {
  const asked = ++state.asked;
  try {
    const answer = await askRows(offset);
    if (asked !== state.asked) return;  // a later question was answered first
    complain(null);
    Object.assign(state, { offset, total: answer.total, rows: answer.rows });
  } catch (error) {
    if (asked === state.asked) complain(error);
    return;
  }
  const list = state.rows.map((row, place) => {
    const one = element("li", null, { role: "option", "aria-selected": "false", tabindex: "0", id: `row-${row.number}` });
    const facts = [named(row.domain), `${number(row.num_tokens)} tokens`], small = element("small", null);
    if (row.nll !== null) facts.push(`NLL ${number(row.nll, 2)}`);
    if (row.value !== undefined && !["nll", "num_tokens"].includes($("order").value)) facts.push(`${$("order").value} ${number(row.value)}`);
    small.append(...line(facts));
    one.append(element("b", visible(row.id), { dir: "auto" }), " ", small, element("span", visible(row.snippet.replace(/\s+/g, " ")), { dir: "auto" }));
    one.onclick = () => showRow(place);
    one.onkeydown = event => { if (event.key === "Enter") showRow(place); };
    return one;
  });
  $("rows").replaceChildren(...list);
  const last = offset + state.rows.length;
  $("total").textContent = state.total ? `Rows ${(offset + 1).toLocaleString("en-US")} to ${last.toLocaleString("en-US")} of ${state.total.toLocaleString("en-US")}` : "No row is left.";
  $("before").disabled = offset === 0;
  $("after").disabled = last >= state.total;
  if (state.rows.length) await showRow(0);
  else clearRow();
}

async function showHistogram() {
  const column = $("column").value;
  let found;
  try { found = await askHistogram(column); } catch (error) { complain(error); return; }
  const [first, last] = $("ends").children;
  drawBars($("histogram"), first, last, found, bar => { setBar(state.bar && state.bar[0] === bar[0] ? null : bar); showRows(); });
}

// The bars of a histogram: all rows, and before them those that are chosen. pick: gets the two ends of a bar, and whether it is the last.
function drawBars(box, first, last, found, pick) {
  const most = Math.max(1, ...found.all);
  box.replaceChildren(...found.all.map((count, n) => {
    const [low, high] = [found.edges[n], found.edges[n + 1]];
    const range = rangeOf(low, found.whole ? high - 1 : high), text = `${range}: ${whole(found.chosen[n])} of ${whole(count)} rows`;
    const bar = element("button", null, { type: "button", title: text, "aria-label": text, tabindex: n ? "-1" : "0" });
    for (const value of [count, found.chosen[n]]) {
      const part = element("i", null);
      part.style.height = `${100 * value / most}%`;
      bar.append(part);
    }
    if (pick) bar.onclick = () => pick([low, high, n === found.all.length - 1, range]);
    return bar;
  }));
  first.textContent = found.edges.length ? number(found.edges[0]) : "no row has it";
  last.textContent = found.all.at(-1) && found.all.length > 1 ? number(found.edges.at(-1) - (found.whole ? 1 : 0)) : "";  // the largest value is in the last bar, unless all are equal
}

const rangeOf = (low, high) => low === high ? number(low) : `${number(low)} to ${number(high)}`;

function setBar(bar) {
  state.bar = bar;
  $("range").textContent = bar ? `only ${bar[3]}` : "";
}

// ---- The overview.

const whole = value => value.toLocaleString("en-US");

function showPage(page) {
  document.body.dataset.page = page;
  for (const one of ["text", "overview"]) $(`show-${one}`).setAttribute("aria-pressed", one === page ? "true" : "false");
  if (page === "overview") showOverview();
}

async function showOverview() {
  const asked = ++state.askedOverview;
  $("overview-facts").textContent = "Counting\u2026";
  let found;
  try {
    found = isServer() ? await fromServer("overview", { ...words(), where: joined(chosen()) }) : await fromFolder("overview");
  } catch (error) {
    if (asked !== state.askedOverview) return;
    $("overview-facts").textContent = "";
    complain(error);
    return;
  }
  if (asked !== state.askedOverview) return;  // the choice has changed since
  const sum = (part, key) => found.domains.reduce((total, one) => total + one[part][key], 0);
  const total = { rows: sum("all", "rows"), tokens: sum("all", "tokens") }, own = { rows: sum("chosen", "rows"), tokens: sum("chosen", "tokens") };
  const plan = $("plan").value;
  $("overview-facts").textContent = `Chosen: ${whole(own.rows)} of ${whole(total.rows)} rows, ${whole(own.tokens)} of ${whole(total.tokens)} tokens${plan.startsWith("+") ? ", repeats counted" : ""}. Blue: what is chosen. Gray: what is left out.`;
  const share = (part, of) => of ? percent(part / of) : "";
  const some = own.rows !== total.rows || own.tokens !== total.tokens;  // otherwise the same numbers would stand there twice
  const cells = (all, mine) => [whole(all.rows), whole(all.tokens), share(all.tokens, total.tokens), all.nll === undefined ? "" : number(all.nll, 2),
    ...(some ? chosenCells(mine) : [])];
  const chosenCells = mine => [whole(mine.rows), whole(mine.tokens), share(mine.tokens, own.tokens), mine.nll === undefined || !mine.rows ? "" : number(mine.nll, 2)];
  const line = (kind, first, values) => {
    const one = element("tr", null), head = element(kind, null);
    head.append(first);
    one.append(head, ...values.map(value => element(kind, value)));
    return one;
  };
  const parts = [["thead", [line("th", "domain", ["rows", "tokens", "share", "NLL", ...(some ? ["chosen: rows", "tokens", "share", "NLL"] : [])])]],
    ["tbody", found.domains.map(one => {
      const button = element(isServer() ? "button" : "span", named(one.domain), isServer() ? { type: "button" } : {});
      button.onclick = () => { $("domain").value = `=${one.domain}`; setBar(null); showPage("text"); showRows(); showHistogram(); };
      return line("td", button, cells(one.all, one.chosen));
    })], ["tfoot", [line("td", "all", cells(total, own))]]];
  $("domains").replaceChildren(...parts.map(([kind, lines]) => { const part = element(kind, null); part.append(...lines); return part; }));
  $("histograms").replaceChildren(...found.histograms.map(one => {
    const figure = element("figure", null), box = element("div", null, { class: "bars", role: "group", "aria-label": `Histogram of ${one.column}` });
    const ends = element("p", null, { class: "ends" }), [first, last] = [element("span", null), element("span", null)];
    ends.append(first, last);
    figure.append(element("figcaption", LABELS[one.column] ?? (one.column.endsWith(" - nll") ? `${one.column}: NLL of ${one.column.split(".")[0]} less the teacher's` : one.column)), box, ends);
    drawBars(box, first, last, one, isServer() ? bar => showBin(one.column, bar) : null);
    return figure;
  }));
}

const LABELS = { num_tokens: "num_tokens: length of a row in tokens", nll: "nll: the teacher's NLL, nats per target token" };

// Rows of a bin, a random few of them first unless an order was chosen.
function showBin(column, bar) {
  $("column").value = column;
  setBar(bar);
  if (!$("order").value) $("order").value = "random";
  showPage("text");
  showHistogram();
  showRows();
}

// ---- One row.

function clearRow() {
  state.askedRow += 1;
  Object.assign(state, { row: null, token: -1 });
  $("row-id").textContent = "Choose a row";
  $("row-facts").textContent = "";
  $("tokens").replaceChildren();
  for (const id of ["pieces", "other"]) $(id).hidden = true;
  showToken(-1);
}

async function showRow(place, begin = 0) {
  const row = state.rows[place], asked = ++state.askedRow;
  let shown;
  try { shown = await askRow(row.number, begin); } catch (error) { if (asked === state.askedRow) complain(error); return; }
  if (asked !== state.askedRow) return;  // another row was chosen since
  complain(shown.problem ? new Error(shown.problem) : null);
  Object.assign(state, { row: shown, place, token: -1, pinned: false, starts: [0] });
  for (const count of shown.num_kept) state.starts.push(state.starts.at(-1) + count);
  for (const one of $("rows").children) {
    const own = one.id === `row-${row.number}`;
    one.setAttribute("aria-selected", own ? "true" : "false");
    if (own) one.scrollIntoView({ block: "nearest" });
  }
  $("row-id").textContent = visible(shown.id);
  const facts = [named(shown.domain), `${number(shown.num_tokens)} tokens`];
  for (const key of ["nll", "mean_entropy", "kept_mass", "source", "license", "finish_reason"])
    if (shown.columns[key] !== undefined && shown.columns[key] !== null) facts.push(`${key} ${typeof shown.columns[key] === "number" ? number(shown.columns[key]) : shown.columns[key]}`);
  for (const [plan, repeats] of Object.entries(shown.plans)) facts.push(`plan ${plan}: ${repeats ? `taken ${repeats > 1 ? `${repeats} times` : ""}` : "left out"}`);
  $("row-facts").replaceChildren(...line(facts));
  $("tokens").replaceChildren(...shown.tokens.map((_, n) => {
    const one = tokenOf(shown, n, { role: "option", "aria-selected": "false", tabindex: n ? "-1" : "0", "data-n": n });
    if (shown.logprob[n] === null && !shown.num_kept[n]) one.classList.add("none");
    return one;
  }));
  $("pieces").hidden = shown.num_tokens <= shown.tokens.length;
  $("piece-before").disabled = begin === 0;
  $("piece-after").disabled = begin + shown.tokens.length >= shown.num_tokens;
  showOther();
  paint();
  showToken(-1);
}

// A token in its text. A character of several tokens stands at the first of them, and narrow fields for the others.
function tokenOf(row, n, parts) {
  const text = row.whole ? row.whole[n] : row.tokens[n], goesOn = !text && row.tokens[n];
  return element("span", visible(text), goesOn ? { ...parts, class: "part", "aria-label": "goes on with the character before" } : parts);
}

function showOther() {
  const beside = state.row.beside, box = $("other");
  box.hidden = !beside || (!beside.missing && beside.same_tokens);
  if (box.hidden) return;
  box.querySelector("h3").textContent = beside.missing ? `${state.about.beside.name} does not have this row` : `The same row in ${state.about.beside.name}, in its own tokens`;
  box.querySelector("p").hidden = beside.missing;
  if (beside.missing) return;
  box.querySelector("p").replaceChildren(...beside.tokens.map((_, n) => {
    const one = tokenOf(beside, n, { title: beside.logprob[n] === null ? "not predicted" : `probability ${percent(Math.exp(beside.logprob[n]))}` });
    one.style.setProperty("--share", share(beside.logprob[n] === null ? null : -beside.logprob[n], 8));
    return one;
  }));
}

// What colors a token: how to read the number, where the color is full, and whether less than 0 has one too.
const sum = (a, b) => a === null || b === null || a === undefined || b === undefined ? null : a + b;
function colors() {
  const found = {
    "surprise": { of: (row, n) => row.logprob[n] === null ? null : -row.logprob[n], full: 8, unit: "nats" },
    "entropy": { of: (row, n) => row.entropy[n], full: 6, unit: "nats" },
    "mass outside the exact entries": { of: (row, n) => row.num_kept[n] ? row.tail[n] : null, full: 1, unit: "" },
  };
  for (const score of state.about.token_scores) {
    found[`NLL by ${score}`] = { of: (row, n) => row.scores[score][n], full: 8, unit: "nats" };
    found[`NLL by ${score}, less the teacher's`] = { of: (row, n) => sum(row.scores[score][n], row.logprob[n]), full: 4, unit: "nats" };
  }
  if (state.about.beside) {
    const other = row => row.beside && !row.beside.missing && row.beside.same_tokens ? row.beside : null;
    found[`surprise of ${state.about.beside.name}`] = { of: (row, n) => other(row) && other(row).logprob[n] !== null ? -other(row).logprob[n] : null, full: 8, unit: "nats" };
    found[`surprise of ${state.about.beside.name}, less the teacher's`] = { of: (row, n) => other(row) && other(row).logprob[n] !== null ? sum(-other(row).logprob[n], row.logprob[n]) : null, full: 4, unit: "nats" };
  }
  return found;
}

const share = (value, full) => value === null || value === undefined ? 0 : Math.min(Math.abs(value) / full, 1) * 0.75;

function paint() {
  if (!state.row) return;
  const color = colors()[$("color").value];
  $("scale").textContent = `no color at 0, full at ${color.full} ${color.unit} or more${$("color").value.includes("less") ? "; blue below 0" : ""}`;
  for (const [n, one] of [...$("tokens").children].entries()) {
    const value = color.of(state.row, n);
    one.style.setProperty("--share", share(value, color.full));
    one.classList.toggle("less", value !== null && value < 0);
  }
}

function showToken(n, focus = false) {
  const tokens = $("tokens").children;
  if (state.token >= 0 && tokens[state.token]) tokens[state.token].setAttribute("aria-selected", "false");
  state.token = n;
  if (n < 0 || !tokens[n]) {
    $("token").textContent = "Token";
    $("token-facts").textContent = "Point at a token, or go there with the arrow keys.";
    $("believed").replaceChildren();
    return;
  }
  tokens[n].setAttribute("aria-selected", "true");
  if (focus) tokens[n].focus();
  const row = state.row, facts = [`position ${row.begin + n}`, `id ${row.token_ids[n]}`];
  $("token").textContent = shownToken(row.tokens[n], row.token_ids[n]);
  if (row.logprob[n] === null && !row.num_kept[n]) {
    $("token-facts").textContent = [...facts, "nothing was recorded here"].join(" \u00b7 ");
    $("believed").replaceChildren();
    return;
  }
  facts.push(row.logprob[n] === null ? "its probability is not known" : `probability ${percent(Math.exp(row.logprob[n]))}`);
  if (row.rank[n]) facts.push(`rank ${number(row.rank[n])}`);
  if (row.entropy[n] !== null) facts.push(`entropy ${number(row.entropy[n], 2)} nats`);
  for (const [score, values] of Object.entries(row.scores)) if (values[n] !== null) facts.push(`by ${score}: ${percent(Math.exp(-values[n]))}`);
  if (!row.target[n]) facts.push("no target");
  $("token-facts").textContent = facts.join(" \u00b7 ");
  const tables = [believed(row, n, `${state.about.teacher}: what comes after the text before`)];
  if (row.beside && row.beside.same_tokens) tables.push(believed(row.beside, n, state.about.beside.name));
  $("believed").replaceChildren(...tables);
}

function believed(row, n, title) {
  const table = element("table", null);
  table.append(element("caption", visible(title)));
  let start = 0;
  for (let k = 0; k < n; k += 1) start += row.num_kept[k];
  const line = (text, p, kind, label) => {
    const one = element("tr", null, { class: kind }), bar = element("i", null), cell = element("td", null);
    bar.style.width = `${100 * Math.min(p ?? 0, 1)}%`;
    cell.append(bar);
    one.append(element("td", text), cell, element("td", label));
    table.append(one);
  };
  const entries = Array.from({ length: row.num_kept[n] }, (_, k) => k);
  entries.sort((a, b) => (a >= row.num_exact[n]) - (b >= row.num_exact[n]) || row.probability[start + b] - row.probability[start + a]);
  for (const k of entries) {
    const p = row.probability[start + k], drawn = k >= row.num_exact[n], own = row.entry_id[start + k] === row.token_ids[n];
    line(shownToken(row.names[row.entry[start + k]], row.entry_id[start + k]), p, `${drawn ? "drawn" : "exact"}${own ? " actual" : ""}`, `${drawn ? "draw " : ""}${percent(p)}`);
  }
  if (!row.num_kept[n]) line("no distribution is kept here", 0, "rest", "");
  else if (row.tail[n] && !state.about.draws) line("the rest", row.tail[n], "rest", percent(row.tail[n]));
  else if (row.tail[n]) table.append(element("caption", `the draws stand for the rest, ${percent(row.tail[n])}`, { class: "under" }));
  return table;
}

async function showRejects() {
  const found = await fromServer("rejects", {});
  $("rejects").hidden = false;
  $("rejects").querySelector("summary").textContent = `Rejected rows: ${found.counts.map(one => `${one.reason} ${one.n.toLocaleString("en-US")}`).join(", ")}`;
  $("rejects").append(...found.first.map(one => element("p", visible(`${one.id} (${one.domain}): ${one.detail || one.reason}`))));
}

// ---- Hands.

function listen() {
  const again = () => { setBar(null); showRows(); showHistogram(); if (document.body.dataset.page === "overview") showOverview(); };
  $("filter").onsubmit = event => { event.preventDefault(); again(); };
  for (const id of ["domain", "plan", "order", "descending"]) $(id).onchange = again;
  for (const page of ["text", "overview"]) $(`show-${page}`).onclick = () => showPage(page);
  $("column").onchange = () => { const had = state.bar; setBar(null); showHistogram(); if (had) showRows(); };
  $("color").onchange = paint;
  $("before").onclick = () => showRows(Math.max(0, state.offset - PAGE));
  $("after").onclick = () => showRows(state.offset + PAGE);
  $("piece-before").onclick = () => showRow(state.place, Math.max(0, state.row.begin - state.about.piece));
  $("piece-after").onclick = () => showRow(state.place, state.row.begin + state.about.piece);
  const tokens = $("tokens"), at = event => Number(event.target.dataset?.n ?? -1);
  tokens.onpointerover = event => { if (event.pointerType !== "touch" && !state.pinned && at(event) >= 0) showToken(at(event)); };
  tokens.onclick = event => { if (at(event) >= 0) { state.pinned = !(state.pinned && at(event) === state.token); showToken(at(event)); } };
  document.onkeydown = event => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
    const token = { ArrowLeft: -1, ArrowRight: 1 }[event.key], row = { k: -1, j: 1 }[event.key];
    const bar = token && event.target.parentElement?.classList.contains("bars") ? event.target : null;
    if (event.key === "/") { event.preventDefault(); $("where").focus(); }
    else if (event.key === "o") showPage(document.body.dataset.page === "overview" ? "text" : "overview");
    else if (bar) {
      event.preventDefault();
      (token < 0 ? bar.previousElementSibling : bar.nextElementSibling)?.focus();
    }
    else if (token && state.row) {
      event.preventDefault();
      state.pinned = true;
      const to = state.token + token, end = state.row.begin + state.row.tokens.length;
      if (to >= state.row.tokens.length && end < state.row.num_tokens) showRow(state.place, end);
      else showToken(Math.max(0, Math.min(state.row.tokens.length - 1, to)), true);
    } else if (row && state.rows[state.place + row]) showRow(state.place + row);
  };
}

async function begin() {
  try {
    state.about = isServer() ? await fromServer("about", {}) : await fromFolder("about");
  } catch (error) { complain(error); return; }
  const about = state.about;
  document.title = `${about.name} \u00b7 kdata`;
  $("name").textContent = visible(about.name);
  const facts = [`teacher ${about.teacher}`, `${about.rows.toLocaleString("en-US")} rows`, `${about.tokens.toLocaleString("en-US")} tokens`, `kept: ${about.kept}`, ...about.positions];
  if (about.rejected) facts.push(`${about.rejected.toLocaleString("en-US")} rejected`);
  if (about.exported) facts.push(`${about.exported.toLocaleString("en-US")} rows are in this folder`);
  if (about.beside) facts.push(`beside: ${about.beside.name} (${about.beside.teacher})`);
  $("facts").textContent = visible(facts.join(" \u00b7 "));
  if (isServer() && about.rejected) showRejects();
  $("left-out").textContent = about.left_out.join(" ");
  $("left-out").hidden = !about.left_out.length;
  fill($("domain"), about.domains.map(one => [`=${one.domain}`, `${named(one.domain)} (${one.n.toLocaleString("en-US")})`]));
  fill($("plan"), about.plans.flatMap(one => [[`+${one.name}`, `taken by ${one.name} (${one.rows.toLocaleString("en-US")})`], [`-${one.name}`, `left out by ${one.name}`]]));
  const numbers = isServer() ? about.numbers : ["nll", "mean_entropy", "num_tokens"];
  fill($("order"), [...numbers, ...(isServer() ? ["random"] : [])].map(one => [one, one]));
  fill($("column"), numbers.map(one => [one, one]));
  fill($("color"), Object.keys(colors()).map(one => [one, one]));
  if (!isServer()) {
    $("where").placeholder = "words of the id or the beginning";
    $("where").parentElement.firstChild.textContent = "Search ";
    $("plan").parentElement.hidden = true;
  }
  listen();
  if (location.hash === "#overview") showPage("overview");
  await Promise.all([showRows(), showHistogram()]);
}

begin();

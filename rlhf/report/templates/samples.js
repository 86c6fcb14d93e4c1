"use strict";
(() => {
const PER_PAGE = 10, REFERENCE = "reference", MANY = 4;
const data = JSON.parse(document.getElementById("samples-data").textContent);
const place = document.querySelector("#samples .browser");
const find = selector => place.querySelector(selector);
const form = find("form"), fields = form.elements, list = find("ol"), outcomes = find(".outcomes");
const segmenter = new Intl.Segmenter(undefined, {granularity: "word"});
const lower = [];  // texts in lower case, made when they are first searched
let shown = [];  // tables of the chosen run
let found = [];  // queries that pass the filters, sorted; each is a number in `data.texts`
let at = 0;  // place in `found` of the sample that is open

for (const table of data.tables) table.rows = new Map(table.query.map((query, row) => [query, row]));
const idOf = new Map(data.queries.map((query, index) => [query, data.ids[index]]));

// Everything is shown as text: strings become text nodes, never HTML.
function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function value(table, column, query) {
  return table[column]?.[table.rows.get(query)] ?? null;
}

function has(column, tables = shown) {
  return tables.some(table => table[column]);
}

function nameOf(table) {
  const several = new Set(shown.map(each => each.run)).size > 1;
  return several ? `${table.policy} (${table.run})` : table.policy;
}

const to = () => data.tables[fields.to.value];
const from = () => data.tables[fields.from.value];  // undefined: the reference

function gain(query) {
  const before = from() ? value(from(), "a_score", query) : value(to(), "b_score", query);
  const after = value(to(), "a_score", query);
  return before === null || after === null ? null : after - before;
}

function word(outcome) {
  return outcome === null ? "not judged" : outcome > 0.5 ? "wins" : outcome < 0.5 ? "loses" : "ties";
}

const KEYS = {
  gain: query => gain(query),
  loss: query => gain(query) === null ? null : -gain(query),
  above: query => value(to(), "distance", query),
  below: query => value(to(), "distance", query) === null ? null : -value(to(), "distance", query),
};

function choose() {
  const run = fields.run.value;
  shown = data.tables.filter(table => !run || table.run === run);
  const options = shown.map(table => [data.tables.indexOf(table), nameOf(table)]);
  fill(fields.to, options);
  fill(fields.from, [["", REFERENCE], ...options]);
  const last = shown.findLast(table => table.policy === "PPO") ?? shown.at(-1);
  const first = shown.find(table => table.policy === "SFT" && table.run === last.run && table !== last);
  fields.to.value = data.tables.indexOf(last);
  fields.from.value = first ? data.tables.indexOf(first) : "";
  outcomes.replaceChildren(...options.map(([index, name]) => {
    const select = element("select", {name: `outcome_${index}`});
    fill(select, [["", "any outcome"], ...["wins", "ties", "loses", "not judged"].map(each => [each, each])]);
    return element("label", {}, name, select);
  }));
}

function fill(select, options) {
  select.replaceChildren(...options.map(([value, text]) => element("option", {value, textContent: text})));
}

function search(query, text) {
  const codes = shown.flatMap(table => [value(table, "a", query), value(table, "b", query)]);
  return [query, ...codes].some(code => code !== null && (lower[code] ??= data.texts[code].toLowerCase()).includes(text));
}

function within(number, name) {
  const [low, high] = [fields[`${name}_low`].value, fields[`${name}_high`].value];
  if (low === "" && high === "") return true;
  return number !== null && (low === "" || number >= low) && (high === "" || number <= high);
}

// Finds and sorts anew; the sample that was open stays open if it is still there.
function update(open = found[at]) {
  const text = fields.text.value.toLowerCase(), table = to(), key = KEYS[fields.sort.value];
  const wanted = shown.map(each => [each, fields[`outcome_${data.tables.indexOf(each)}`].value]).filter(pair => pair[1]);
  found = data.queries.filter(query =>
    shown.some(each => each.rows.has(query))
    && wanted.every(([each, outcome]) => each.rows.has(query) && word(value(each, "outcome", query)) === outcome)
    && (!fields.disagree.checked || value(table, "disagree", query) === 1)
    && within(value(table, "a_length", query), "length")
    && within(value(table, "a_score", query), "reward")
    && (!text || search(query, text)));
  if (key) {
    const keys = new Map(found.map(query => [query, key(query) ?? -Infinity]));
    found.sort((one, other) => keys.get(other) - keys.get(one) || 0);  // infinities of what has no key: NaN
  }
  at = Math.max(0, found.indexOf(open));
  describe();
  show();
}

// Names the filters after the policy that they look at, and hides those that have nothing to look at.
function describe() {
  const name = nameOf(to()), tables = [to()];
  find(".length legend").textContent = `Length of ${name} (${data.unit})`;
  find(".reward legend").textContent = `Reward of ${name}`;
  find(".disagree span").textContent = `Reward model and judge disagree on ${name}`;
  find(".reward").hidden = !has("a_score", tables);
  find(".disagree").hidden = !has("disagree", tables);
  for (const option of fields.sort.options) {
    const column = {gain: "a_score", loss: "a_score", above: "distance", below: "distance"}[option.value];
    option.hidden = option.disabled = column && !has(column, tables);
  }
  const judge = has("a_gold", tables) ? "the gold score" : "the judge";
  find(".explained").textContent = ["above", "below"].includes(fields.sort.value)
    ? `All queries are ranked from 0 to 1 by how far ${name} is above the reference: once by the reward model, once by `
      + `${judge}. Sorted by the difference of the two ranks; a policy that exploits its reward model has many large ones.`
    : "";
}

function show(focus = false) {
  const query = found[at], page = Math.floor(at / PER_PAGE), pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
  find(".count").textContent = `${found.length} of ${data.queries.length} samples`;
  list.replaceChildren(...found.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map((each, index) => item(each, page * PER_PAGE + index)));
  find(".pages span").textContent = `page ${page + 1} of ${pages}`;
  for (const button of place.querySelectorAll("[data-step]")) button.disabled = !found.length || step(button.dataset.step) === at;
  find("article").hidden = query === undefined;
  if (query !== undefined) sample(query);
  if (focus) list.querySelector("[aria-current]")?.focus();
}

function item(query, index) {
  const facts = shown.filter(table => table.rows.has(query)).slice(0, MANY).map(table => `${nameOf(table)} ${word(value(table, "outcome", query))}`);
  const sort = fields.sort.value, key = ["above", "below"].includes(sort) ? value(to(), "distance", query) : gain(query);
  if (key !== null) facts.push(`${["above", "below"].includes(sort) ? "ranks apart" : "reward"} ${signed(key)}`);
  const start = data.texts[query].slice(data.prefix, data.prefix + 200).trim();
  const button = element("button", {type: "button", onclick: () => move(index, true)},
    element("span", {className: "start"}, start || "(empty)"), element("span", {className: "facts"}, facts.join(" · ")));
  if (index === at) button.setAttribute("aria-current", "true");
  return element("li", {}, button);
}

const signed = number => (number < 0 ? "−" : "+") + Math.abs(number).toFixed(2);

function sample(query) {
  const tables = shown.filter(table => table.rows.has(query));
  find(".place").textContent = `${at + 1} of ${found.length}`;
  find(".link").href = `#sample=${idOf.get(query)}`;
  find(".query").textContent = data.texts[query];
  const references = [...new Set(tables.map(table => value(table, "b", query)))];
  const cards = references.map(code => {
    const own = tables.filter(table => value(table, "b", query) === code);
    const name = references.length > 1 ? `${REFERENCE} of ${own.map(nameOf).join(", ")}` : REFERENCE;
    return card(name, code, own, "b", query, !from() && own.includes(to()));
  });
  cards.push(...tables.map(table => card(nameOf(table), value(table, "a", query), [table], "a", query, table === from() || table === to())));
  find(".responses").replaceChildren(...cards.map(each => each.made));
  mark(cards, query);
}

function card(name, code, tables, side, query, compared) {
  const facts = [];
  for (const [column, label] of [["score", "reward"], ["gold", "gold"], ["length", ""]]) {
    const numbers = new Set(tables.map(table => value(table, `${side}_${column}`, query)));
    const [number] = numbers;  // reward models of several runs differ
    if (numbers.size === 1 && number !== null) facts.push(label ? `${label} ${number.toFixed(2)}` : `${number} ${data.unit}`);
  }
  const head = element("h3", {}, name);
  if (side === "a") {
    const outcome = value(tables[0], "outcome", query);
    head.append(" ", element("span", {className: `outcome ${word(outcome)}`}, word(outcome)));
    if (value(tables[0], "a_has_eos", query) === 0) facts.push("cut off");
    if (value(tables[0], "disagree", query) === 1) facts.push("reward model and judge disagree");
  }
  const written = element("div", {className: "written"}, data.texts[code]);
  const made = element("section", {className: compared ? "response compared" : "response"}, head,
    element("div", {className: "numbers-of"}, facts.join(" · ")), written);
  return {made, written, name, code, tables, side};
}

// Words with the space behind them, in any script.
function words(text) {
  const parts = [];
  for (const {segment} of segmenter.segment(text)) {
    if (!segment.trim() && parts.length) parts.push(parts.pop() + segment);
    else parts.push(segment);
  }
  return parts;
}

function mark(cards, query) {
  const after = cards.find(each => each.side === "a" && each.tables[0] === to());
  const before = cards.find(each => from() ? each.side === "a" && each.tables[0] === from() : each.side === "b" && each.tables.includes(to()));
  const legend = find(".legend");
  legend.textContent = "";
  if (!before || !after || before === after) return;
  const [old, fresh] = [before, after].map(each => words(data.texts[each.code]));
  const same = (one, other) => one.trim() === other.trim();
  const changes = Diff.diffArrays(old, fresh, {comparator: same, timeout: 1000});
  if (!changes) return void (legend.textContent = "The two texts are too long and too different to be compared.");
  legend.textContent = `Struck through: only in ${before.name}. Underlined: only in ${after.name}.`;
  const [left, right] = [[], []];
  for (const {count, added, removed} of changes) {  // each text keeps its own space
    if (!added) left.push(element(removed ? "del" : "span", {}, old.splice(0, count).join("")));
    if (!removed) right.push(element(added ? "ins" : "span", {}, fresh.splice(0, count).join("")));
  }
  before.written.replaceChildren(...left);
  after.written.replaceChildren(...right);
}

function step(by) {
  const size = by.endsWith("page") ? PER_PAGE : 1, back = by.startsWith("-");
  const page = Math.floor(at / PER_PAGE) * PER_PAGE, target = size > 1 ? page + (back ? -size : size) : at + (back ? -1 : 1);
  return target < 0 || target >= found.length ? at : target;
}

function move(index, focus) {
  at = index;
  show(focus);
  if (found.length) history.replaceState(null, "", find(".link").href);
}

// Opens the sample of the address, without filters, in a run that has it.
function follow() {
  const id = new URLSearchParams(location.hash.slice(1)).get("sample"), index = data.ids.indexOf(id);
  if (index < 0) return;
  const query = data.queries[index], run = fields.run.value, answers = table => table.rows.has(query);
  form.reset();
  fields.run.value = shown.some(answers) ? run : data.tables.find(answers).run;
  choose();
  update(query);
  find("article").scrollIntoView();
}

place.addEventListener("click", event => {
  const by = event.target.dataset.step;
  if (by) move(step(by), false);
});
place.addEventListener("keydown", event => {
  if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const inList = list.contains(event.target);
  const by = {j: "1", ArrowRight: "1", k: "-1", ArrowLeft: "-1", ...(inList && {ArrowDown: "1", ArrowUp: "-1"})}[event.key];
  if (!by || !found.length) return;
  event.preventDefault();
  move(step(by), inList);
});
form.addEventListener("input", event => {
  if (event.target === fields.run) choose();
  update();
});
form.addEventListener("submit", event => event.preventDefault());
form.addEventListener("reset", () => setTimeout(() => { choose(); update(); }));
addEventListener("hashchange", follow);

const runs = [...new Set(data.tables.map(table => table.run))];
fill(fields.run, [...runs.map(run => [run, run]), ["", "all"]]);
if (data.tables.length <= MANY) [...fields.run.options].forEach(option => { option.defaultSelected = option.value === ""; });
find(".runs").hidden = runs.length === 1;
choose();
update();
follow();
})();

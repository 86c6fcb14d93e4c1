"use strict";
(() => {
const PER_PAGE = 10, FEW = 4;
const data = JSON.parse(document.getElementById("samples-data").textContent), REFERENCE = data.reference;
const place = document.querySelector("#samples .browser"), find = selector => place.querySelector(selector);
const form = find("form"), fields = form.elements, list = find("ol");
const segmenter = new Intl.Segmenter(undefined, {granularity: "word"});
const lower = [];  // texts in lower case, made when they are first searched
let shown = [];  // tables of the chosen run
let found = [];  // queries that pass the filters, sorted; each is a place in `data.texts`
let at = 0;  // place in `found` of the sample that is open

for (const table of data.tables) table.rows = new Map(table.query.map((query, row) => [query, row]));
const value = (table, column, query) => table[column]?.[table.rows.get(query)] ?? null;
const to = () => data.tables[fields.to.value];
const from = () => data.tables[fields.from.value];  // undefined: the reference
const outcome = (table, query) => {
  const points = value(table, "outcome", query);
  return points === null ? "not judged" : points > 0.5 ? "wins" : points < 0.5 ? "loses" : "ties";
};
const signed = number => (number < 0 ? "" : "+") + number.toFixed(2);
const measures = {
  gain(query) {
    const before = from() ? value(from(), "a_score", query) : value(to(), "b_score", query);
    const after = value(to(), "a_score", query);
    // Two runs have one reward model if it gives the same reward to the reference.
    const references = [from() ?? to(), to()].map(table => value(table, "b_score", query));
    if (from()?.run !== to().run && Math.abs(references[0] - references[1]) > 1e-3) return null;
    return before === null || after === null ? null : after - before;
  },
  distance: query => value(to(), "distance", query),
};

function nameOf(table) {
  return new Set(shown.map(each => each.run)).size > 1 ? `${table.policy} (${table.run})` : table.policy;
}

// Everything is shown as text: strings become text nodes, never HTML.
function element(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => element("option", {value, textContent: text})));
  select.value = chosen;
}

// Takes the tables of the chosen run, and compares SFT with PPO, or the reference with the last policy.
function choose() {
  shown = data.tables.filter(table => !fields.run.value || table.run === fields.run.value);
  const options = shown.map(table => [data.tables.indexOf(table), nameOf(table)]);
  const last = shown.findLast(table => table.policy === "PPO") ?? shown.at(-1);
  const first = shown.find(table => table.policy === "SFT" && table.run === last.run && table !== last);
  fill(fields.to, options, data.tables.indexOf(last));
  fill(fields.from, [["", REFERENCE], ...options], first ? data.tables.indexOf(first) : "");
  find(".outcomes").replaceChildren(...options.map(([index, name]) => {
    const select = element("select", {name: `outcome_${index}`});
    fill(select, [["", "any"], ...["wins", "ties", "loses", "not judged"].map(each => [each, each])], "");
    return element("label", {}, `Outcome of ${name}`, select);
  }));
}

function contains(query, text) {
  const codes = [query, ...shown.flatMap(table => [value(table, "a", query), value(table, "b", query)])];
  return codes.some(code => code !== null && (lower[code] ??= data.texts[code].toLowerCase()).includes(text));
}

function within(number, name) {
  const [low, high] = [fields[`${name}_low`].value, fields[`${name}_high`].value];
  return !(low || high) || number !== null && (!low || number >= low) && (!high || number <= high);
}

// Finds and sorts anew, and opens a query if it is among them, or the first one.
function update(query) {
  const table = to();
  describe(table);
  const text = fields.text.value.toLowerCase();
  const wanted = shown.map(each => [each, fields[`outcome_${data.tables.indexOf(each)}`].value]).filter(pair => pair[1]);
  found = data.queries.filter(query =>
    shown.some(each => each.rows.has(query))
    && wanted.every(([each, chosen]) => each.rows.has(query) && outcome(each, query) === chosen)
    && (!fields.disagree.checked || value(table, "disagree", query) === 1)
    && within(value(table, "a_length", query), "length")
    && within(value(table, "a_score", query), "reward")
    && (!text || contains(query, text)));
  const [measure, direction] = fields.sort.value.split(" ");
  if (measure) {
    const keys = new Map(found.map(query => [query, measures[measure](query)]));
    const key = query => keys.get(query) === null ? -Infinity : direction * keys.get(query);  // unknown ones last
    found.sort((one, other) => key(other) - key(one) || 0);  // the difference of two unknown ones is NaN
  }
  at = Math.max(0, found.indexOf(query));
  show();
}

// Names the filters after the policy that they look at; clears and hides those that have nothing to look at.
function describe(table) {
  find(".length legend").textContent = `Length of ${nameOf(table)} (${data.unit})`;
  find(".reward legend").textContent = `Reward of ${nameOf(table)}`;
  find(".disagree span").textContent = `Reward model and judge disagree on ${nameOf(table)}`;
  for (const each of place.querySelectorAll("[data-needs]")) {
    each.hidden = !table[each.dataset.needs];
    if (each.hidden && each.selected) fields.sort.value = "";
    if (each.hidden) for (const input of each.querySelectorAll("input")) input.value = input.checked = "";
  }
  find(".explained").hidden = !fields.sort.value.startsWith("distance");
}

function show(focus = false) {
  const start = at - at % PER_PAGE, query = found[at];
  list.replaceChildren(...found.slice(start, start + PER_PAGE).map((each, index) => item(each, start + index)));
  find(".count").textContent = `${found.length} of ${data.queries.length} samples`;
  find(".pages span").textContent = `${found.length ? start + 1 : 0} to ${Math.min(start + PER_PAGE, found.length)}`;
  for (const button of place.querySelectorAll("[data-step]")) button.disabled = step(button.dataset.step) === at;
  find("article").hidden = query === undefined;
  if (query !== undefined) open(query);
  if (focus) list.querySelector("[aria-current]").focus();
}

function item(query, index) {
  const tables = shown.filter(table => table.rows.has(query)).slice(0, FEW);
  const measure = fields.sort.value.split(" ")[0] || "gain", number = measures[measure](query);
  const facts = tables.map(table => `${nameOf(table)} ${outcome(table, query)}`);
  if (number !== null) facts.push(`${measure === "gain" ? "reward" : "ranks"} ${signed(number)}`);
  const button = element("button", {type: "button", onclick: () => move(index, true)},
    element("span", {className: "start"}, data.texts[query].slice(data.prefix, data.prefix + 300)),
    element("span", {className: "facts"}, facts.join(" · ")));
  if (index === at) button.setAttribute("aria-current", "true");
  return element("li", {}, button);
}

function open(query) {
  const tables = shown.filter(table => table.rows.has(query));
  find(".place").textContent = `${at + 1} of ${found.length}`;
  find(".link").href = `#sample=${data.ids[data.queries.indexOf(query)]}`;
  find(".query").textContent = data.texts[query];
  const references = Map.groupBy(tables, table => value(table, "b", query));
  const cards = [...references.values()].map(own => {
    const name = references.size > 1 ? `${REFERENCE} of ${own.map(nameOf).join(", ")}` : REFERENCE;
    return card(query, name, own, "b");
  });
  cards.push(...tables.map(table => card(query, nameOf(table), [table], "a")));
  find(".responses").replaceChildren(...cards.map(each => each.made));
  const after = cards.find(each => each.side === "a" && each.tables.includes(to()));
  const before = cards.find(each => from() ? each.side === "a" && each.tables.includes(from()) : each.tables.includes(to()));
  find(".legend").textContent = before && after && before !== after ? mark(before, after) : "";
}

function card(query, name, tables, side) {
  const facts = [], text = data.texts[value(tables[0], side, query)].trim(), head = element("h3", {}, name);
  for (const [column, label, digits] of [["score", "reward", 2], ["gold", "gold", 2], ["length", data.unit, 0]]) {
    const numbers = new Set(tables.map(table => value(table, `${side}_${column}`, query)));
    const [number] = numbers;
    if (numbers.size === 1 && number !== null) facts.push(`${label} ${number.toFixed(digits)}`);  // not where runs differ
  }
  if (side === "a") {
    const word = outcome(tables[0], query);
    head.append(" ", element("span", {className: `outcome ${word}`}, word));
    if (value(tables[0], "a_has_eos", query) === 0) facts.push("cut off");
    if (value(tables[0], "disagree", query) === 1) facts.push("reward model and judge disagree");
  }
  const written = element("div", {className: "written"}, text);
  const made = element("section", {className: "response"}, head, element("p", {className: "note"}, facts.join(" · ")), written);
  return {made, written, name, text, tables, side};
}

// Splits a text into words, of any script, with the space behind each.
function words(text) {
  const parts = [];
  for (const {segment} of segmenter.segment(text)) parts.push(segment.trim() || !parts.length ? segment : parts.pop() + segment);
  return parts;
}

// Marks the words that only one of two texts has, and says how.
function mark(before, after) {
  const old = words(before.text), fresh = words(after.text);
  const changes = Diff.diffArrays(old, fresh, {comparator: (one, other) => one.trim() === other.trim(), timeout: 1000});
  if (!changes) return "The two texts are too long and too different to be compared.";
  for (const each of [before, after]) {
    each.made.classList.add("compared");
    each.written.replaceChildren();
  }
  for (const {count, added, removed} of changes) {  // each text keeps its own space
    if (!added) before.written.append(element(removed ? "del" : "span", {}, old.splice(0, count).join("")));
    if (!removed) after.written.append(element(added ? "ins" : "span", {}, fresh.splice(0, count).join("")));
  }
  return `Struck through: only in ${before.name}. Underlined: only in ${after.name}.`;
}

const step = by => Math.max(0, Math.min(at + Number(by), found.length - 1));

function move(index, focus) {
  at = index;
  show(focus);
  history.replaceState(null, "", find(".link").href);
}

// Takes all filters away, and the order.
function clear(run, query) {
  form.reset();
  fields.run.value = run;
  choose();
  update(query);
}

// Opens the sample of the address, without filters, in a run that has it.
function follow() {
  const id = new URLSearchParams(location.hash.slice(1)).get("sample"), query = data.queries[data.ids.indexOf(id)];
  if (query === undefined) return;
  const answers = table => table.rows.has(query), run = shown.some(answers) ? fields.run.value : data.tables.find(answers).run;
  clear(run, query);
  find("article").scrollIntoView();
}

place.addEventListener("click", event => {
  if (event.target.dataset.step) move(step(event.target.dataset.step), false);
});
addEventListener("keydown", event => {
  const {top, bottom} = place.getBoundingClientRect(), seen = top < innerHeight && bottom > 0;
  if (!(place.contains(event.target) || event.target === document.body && seen)) return;
  if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const inList = list.contains(event.target), more = inList ? {ArrowDown: 1, ArrowUp: -1} : {};
  const by = {j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1, ...more}[event.key];
  if (!by || !found.length) return;
  event.preventDefault();
  move(step(by), inList);
});
form.addEventListener("input", event => {
  if (event.target === fields.run) choose();
  update([fields.run, fields.from, fields.to].includes(event.target) ? found[at] : undefined);
});
form.addEventListener("submit", event => event.preventDefault());
find(".clear").addEventListener("click", () => clear(fields.run.value, found[at]));
addEventListener("hashchange", follow);

const runs = [...new Set(data.tables.map(table => table.run))];
fill(fields.run, [...runs.map(run => [run, run]), ["", "all"]], data.tables.length > FEW ? runs[0] : "");
find(".runs").hidden = runs.length === 1;
choose();
update();
follow();
})();

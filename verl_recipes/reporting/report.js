"use strict";
// The charts are drawn already; this adds tables and the values under the pointer. Samples are text nodes, never HTML.
const { charts, reasons } = JSON.parse(document.getElementById("data").textContent);
let samples = [], texts = [];

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

const label = (line) => (line.run ? `${line.label}, ${line.run}` : line.label);
const value = (line, i) => (line.low ? `${short(line.y[i])} (${short(line.low[i])} to ${short(line.high[i])})` : short(line.y[i]));
const whole = (number) => Math.round(number).toLocaleString("en");
const short = (number) => (!Number.isFinite(number) ? "–" : Math.abs(number) < 1000 ? String(Number(number.toPrecision(4))) : whole(number));

function table(chart) {
  const made = element("table"), head = element("tr"), body = element("tbody"), top = element("thead");
  head.append(element("th", "step", { scope: "col" }), ...chart.lines.map((line) => element("th", label(line), { scope: "col" })));
  const columns = chart.lines.map((line) => new Map(line.x.map((x, i) => [x, value(line, i)])));
  for (const step of [...new Set(chart.lines.flatMap((line) => line.x))].sort((a, b) => a - b)) {
    const row = element("tr");
    row.append(element("th", step, { scope: "row" }), ...columns.map((column) => element("td", column.get(step) ?? "")));
    body.append(row);
  }
  top.append(head);
  made.append(top, body);
  return made;
}

// A rule follows the pointer, and the legend names the values of the step beneath it.
function follow(figure, chart) {
  const plot = figure.querySelector(".plot"), outputs = figure.querySelectorAll(".legend output");
  if (!plot) return;
  const [left, right, top, bottom, first, last] = figure.dataset.box.split(" ").map(Number);
  const rule = element("div", undefined, { class: "rule" }), steps = [...new Set(chart.lines.flatMap((line) => line.x))];
  const leave = () => { rule.remove(); outputs.forEach((output) => (output.textContent = "")); };
  plot.addEventListener("pointerleave", leave);
  for (const kind of ["pointermove", "pointerdown"]) plot.addEventListener(kind, (event) => {
    const shown = plot.getBoundingClientRect(), scale = shown.width / plot.querySelector("svg").viewBox.baseVal.width;
    const at = first + (((event.clientX - shown.left) / scale - left) / (right - left)) * (last - first);
    const step = steps.reduce((best, each) => (Math.abs(each - at) < Math.abs(best - at) ? each : best), steps[0]);
    rule.style.left = `${(left + ((step - first) / (last - first)) * (right - left)) * scale}px`;
    rule.style.top = `${top * scale}px`;
    rule.style.height = `${(bottom - top) * scale}px`;
    plot.append(rule);
    chart.lines.forEach((line, i) => {
      const found = line.x.indexOf(step);
      outputs[i].textContent = found < 0 ? "" : `step ${step}: ${value(line, found)}`;
    });
  });
}

const figures = [...document.querySelectorAll("figure[data-chart]")];
for (const figure of figures) {
  const chart = charts[figure.dataset.chart], details = figure.querySelector("details");
  follow(figure, chart);
  details.addEventListener("toggle", () => {
    const place = details.querySelector("div");
    if (details.open && !place.firstChild) place.append(table(chart));
  });
}

// The page of a run that goes on looks again, but not while somebody reads a part: it would close, and filters be lost.
const { refresh } = document.body.dataset;
if (refresh) setInterval(() => document.querySelector("details[open]") || location.reload(), 1000 * refresh);

// A link to a part opens it.
function reveal() {
  const part = location.hash && document.getElementById(location.hash.slice(1))?.closest("details.part");
  if (part) part.open = true;
}
addEventListener("hashchange", reveal);
document.querySelector("nav").addEventListener("click", () => setTimeout(reveal));
reveal();

// Control characters and those that turn the direction of text are shown by their code, so that no response can hide one.
const visible = (text) => text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]/gu,
  (sign) => `⟨U+${sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

const inWords = (reason) => reasons[reason] ?? reason;

function card(sample) {
  const article = element("article"), head = element("h3"), text = element("pre", undefined, { tabindex: "0", role: "region", "aria-label": "Response" });
  const verdict = sample.right === null ? "no verdict" : sample.right ? "✓ right" : `✗ ${inWords(sample.reason)}`;
  const looks = { true: "right", false: "wrong", null: "rest" }[sample.right];
  head.append(element("span", visible(sample.problem)), element("span", visible(verdict), { class: looks }));
  const facts = [`${sample.split === "validation" ? "test" : "training"}, step ${sample.step}`, sample.score === null ? "" : `reward ${sample.score}`,
    sample.tokens === null ? "" : `${sample.tokens} tokens${sample.truncated ? ", cut off" : ""}`, sample.set, several ? sample.run : ""];
  head.append(...facts.filter(Boolean).map((fact) => element("span", visible(fact))));
  for (const [kind, part] of sample.parts) text.append(element("span", visible(part), { class: kind }));
  article.append(head, text);
  return article;
}

const form = document.getElementById("filters"), list = document.getElementById("list"), more = document.getElementById("more");
const PAGE = 20;
let several = false, chosen = [], shown = 0;

const shownAs = (name, each) => (name === "reason" ? inWords(each) : name === "split" ? { train: "training", validation: "test" }[each] : String(each));

function fillFilters() {
  several = new Set(samples.map((sample) => sample.run)).size > 1;
  texts = samples.map((sample) => sample.parts.map((part) => part[1]).join("").toLowerCase());
  for (const name of ["run", "split", "step", "problem", "reason"]) {
    const values = [...new Set(samples.map((sample) => sample[name]))];
    values.sort(name === "step" ? (a, b) => a - b : new Intl.Collator("en", { numeric: true }).compare);
    const select = form.elements[name];
    select.append(element("option", "all", { value: "" }));
    for (const each of values) select.append(element("option", visible(shownAs(name, each)), { value: String(each) }));
    if (name === "run" && !several) select.parentElement.hidden = true;
  }
}

function showMore() {
  const first = chosen.slice(shown, shown + PAGE).map(card);
  list.append(...first);
  shown += first.length;
  more.hidden = shown >= chosen.length;
  return first[0];
}

function filter() {
  const wanted = ["run", "split", "step", "problem", "right", "reason"].map((name) => [name, form.elements[name].value]).filter((pair) => pair[1]);
  const text = form.elements.text.value.toLowerCase();
  chosen = samples.filter((sample, i) => wanted.every(([name, each]) => String(sample[name]) === each) && texts[i].includes(text));
  document.getElementById("count").textContent = `${chosen.length} of ${samples.length} samples`;
  list.replaceChildren();
  shown = 0;
  showMore();
}
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
more.addEventListener("click", () => showMore()?.querySelector("pre").focus());

// The samples of one problem at the first and at the last evaluation that has it.
const pair = document.getElementById("pair"), sides = document.getElementById("sides"), problems = new Map();

function fillPairs() {
  for (const sample of samples.filter((each) => each.split === "validation")) {
    const name = several ? `${sample.problem}, ${sample.run}` : sample.problem, steps = problems.get(name) ?? new Map();
    steps.set(sample.step, [...(steps.get(sample.step) ?? []), sample]);
    problems.set(name, steps);
  }
  for (const [problem, steps] of problems) {
    if (steps.size > 1) pair.append(element("option", visible(problem), { value: problem }));
  }
}

function compare() {
  sides.replaceChildren();
  const steps = problems.get(pair.value);
  if (!steps) return void sides.append(element("p", "No problem has samples at two tests."));
  for (const step of [Math.min(...steps.keys()), Math.max(...steps.keys())]) {
    const side = element("section", undefined, { "aria-label": `Step ${step}` }), group = steps.get(step);
    const judged = group.filter((sample) => sample.right !== null), right = judged.filter((sample) => sample.right);
    side.append(element("p", `Step ${step}: ${judged.length ? `${right.length} of ${judged.length} right` : `${group.length} samples`}`), ...group.map(card));
    sides.append(side);
  }
}
pair.addEventListener("input", compare);

async function unpack() {
  const bytes = Uint8Array.from(atob(document.getElementById("packed").textContent), (sign) => sign.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

unpack().then((found) => {
  samples = found;
  fillFilters();
  filter();
  fillPairs();
  compare();
  document.body.dataset.ready = "yes";
}, () => (document.getElementById("count").textContent = "This browser is too old to unpack the samples; any of 2023 or later can."));

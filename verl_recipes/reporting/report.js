"use strict";
// Charts by plotly, drawn when they come into view; samples as text nodes, never as HTML.
const { charts, samples } = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#3f8fd2", "#d9822b", "#2c9f6f", "#c0569e", "#98942a", "#d3524b", "#7a78d8", "#7d8590"];
const DASHES = ["solid", "dot", "dash", "dashdot", "longdash"];
const dark = matchMedia("(prefers-color-scheme: dark)");

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

const short = (name) => name.replace(/^(reward\/reason|reward|timing_s|actor|val-core)\//, "");
const label = (line) => (line.run ? `${short(line.name)}, ${line.run}` : short(line.name));
// A chart of several runs has a colour for each run and a dash for each metric; one of a single run, a colour a metric.
function looks(chart) {
  const names = [...new Set(chart.lines.map((line) => line.name))];
  const several = new Set(chart.lines.map((line) => line.group)).size > 1;
  return (line) => several
    ? { color: COLOURS[line.group % COLOURS.length], dash: DASHES[names.indexOf(line.name) % DASHES.length] }
    : { color: COLOURS[names.indexOf(line.name) % COLOURS.length], dash: DASHES[Math.floor(names.indexOf(line.name) / COLOURS.length) % DASHES.length] };
}

function draw(figure) {
  const chart = charts[figure.dataset.chart], place = figure.querySelector(".plot"), look = looks(chart), traces = [];
  for (const line of chart.lines) {
    const { color, dash } = look(line);
    if (line.low) {
      const edge = { x: line.x, mode: "lines", line: { width: 0, color }, hoverinfo: "skip", showlegend: false };
      traces.push({ ...edge, y: line.low }, { ...edge, y: line.high, fill: "tonexty", fillcolor: color + "38" });
    }
    const few = line.x.length < 40;
    traces.push({ x: line.x, y: line.y, name: label(line), mode: few ? "lines+markers" : "lines", line: { color, dash, width: 2 }, marker: { size: 4 } });
  }
  const style = getComputedStyle(document.body), ink = style.color, grid = style.getPropertyValue("--line");
  const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true };
  Plotly.react(place, traces, {
    margin: { l: 45, r: 8, t: 8, b: 36 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink, family: "system-ui, sans-serif", size: 12 }, xaxis: { ...axis, title: { text: "step" } }, yaxis: axis,
    hovermode: "closest", showlegend: chart.lines.length > 1,
    legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, font: { size: 11 } },
  }, { displayModeBar: false, responsive: true });
  figure.dataset.drawn = "yes";
}

function describe(figure) {
  const chart = charts[figure.dataset.chart];
  const ends = chart.lines.slice(0, 6).map((line) =>
    `${label(line)} from ${line.y[0]} at step ${line.x[0]} to ${line.y.at(-1)} at step ${line.x.at(-1)}`);
  figure.querySelector(".plot").setAttribute("aria-label", `Chart of ${chart.title}: ${ends.join("; ")}. The table below has all values.`);
  const details = figure.querySelector("details");
  details.addEventListener("toggle", () => {
    const place = details.querySelector("div");
    if (!details.open || place.firstChild) return;
    const table = element("table"), head = element("tr"), body = element("tbody");
    head.append(element("th", "step", { scope: "col" }), ...chart.lines.map((line) => element("th", label(line), { scope: "col" })));
    const columns = chart.lines.map((line) => new Map(line.x.map((x, i) => [x, line.low ? `${line.y[i]} (${line.low[i]} to ${line.high[i]})` : line.y[i]])));
    for (const step of [...new Set(chart.lines.flatMap((line) => line.x))].sort((a, b) => a - b)) {
      const row = element("tr");
      row.append(element("th", step, { scope: "row" }), ...columns.map((column) => element("td", column.get(step) ?? "–")));
      body.append(row);
    }
    const top = element("thead");
    top.append(head);
    table.append(top, body);
    place.append(table);
  });
}

const figures = [...document.querySelectorAll("figure[data-chart]")];
figures.forEach((figure) => {
  describe(figure);
  figure.classList.toggle("many", charts[figure.dataset.chart].lines.length > 5);
});
const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (isIntersecting) { seen.unobserve(target); draw(target); }
  }
}, { rootMargin: "300px" });
figures.forEach((figure) => seen.observe(figure));
dark.addEventListener("change", () => figures.filter((figure) => figure.dataset.drawn).forEach(draw));

// Control characters and those that turn the direction of text are shown by their code, so that no response can hide one.
const visible = (text) => text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]/gu,
  (sign) => `⟨U+${sign.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);

function card(sample) {
  const article = element("article"), head = element("h3"), text = element("pre", undefined, { tabindex: "0", role: "region", "aria-label": "Response" });
  const verdict = sample.right === null ? "no verdict" : sample.right ? "✓ right" : `✗ ${sample.reason}`;
  const looks = { true: "right", false: "wrong", null: "rest" }[sample.right];
  head.append(element("span", visible(sample.problem)), element("span", visible(verdict), { class: looks }));
  const facts = [`${sample.split}, step ${sample.step}`, sample.score === null ? "" : `score ${sample.score}`,
    sample.tokens === null ? "" : `${sample.tokens} tokens${sample.truncated ? ", truncated" : ""}`, sample.set, several ? sample.run : ""];
  head.append(...facts.filter(Boolean).map((fact) => element("span", visible(fact))));
  for (const [kind, part] of sample.parts) text.append(element("span", visible(part), { class: kind }));
  article.append(head, text);
  return article;
}

const form = document.getElementById("filters"), list = document.getElementById("list"), more = document.getElementById("more");
const several = new Set(samples.map((sample) => sample.run)).size > 1;
const PAGE = 20;
let chosen = [], shown = 0;
const texts = samples.map((sample) => sample.parts.map((part) => part[1]).join("").toLowerCase());

for (const name of ["run", "split", "step", "problem", "reason"]) {
  const values = [...new Set(samples.map((sample) => sample[name]))];
  values.sort(name === "step" ? (a, b) => a - b : new Intl.Collator("en", { numeric: true }).compare);
  form.elements[name].append(element("option", "all", { value: "" }));
  for (const value of values) form.elements[name].append(element("option", visible(String(value)), { value: String(value) }));
  if (name === "run" && !several) form.elements[name].parentElement.hidden = true;
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
  chosen = samples.filter((sample, i) => wanted.every(([name, value]) => String(sample[name]) === value) && texts[i].includes(text));
  document.getElementById("count").textContent = `${chosen.length} of ${samples.length} samples`;
  list.replaceChildren();
  shown = 0;
  showMore();
}
form.addEventListener("input", filter);
form.addEventListener("submit", (event) => event.preventDefault());
more.addEventListener("click", () => showMore()?.querySelector("pre").focus());
filter();

// The samples of one problem at the first and at the last evaluation that has it.
const pair = document.getElementById("pair"), sides = document.getElementById("sides"), problems = new Map();
for (const sample of samples.filter((each) => each.split === "validation")) {
  const steps = problems.get(sample.problem) ?? new Map();
  steps.set(sample.step, [...(steps.get(sample.step) ?? []), sample]);
  problems.set(sample.problem, steps);
}
for (const [problem, steps] of problems) {
  if (steps.size > 1) pair.append(element("option", visible(problem), { value: problem }));
}
function compare() {
  sides.replaceChildren();
  const steps = problems.get(pair.value);
  if (!steps) return void sides.append(element("p", "No problem has samples at two evaluations."));
  for (const step of [Math.min(...steps.keys()), Math.max(...steps.keys())]) {
    const side = element("section", undefined, { "aria-label": `Step ${step}` }), group = steps.get(step);
    const judged = group.filter((sample) => sample.right !== null), right = judged.filter((sample) => sample.right);
    side.append(element("p", `Step ${step}: ${judged.length ? `${right.length} of ${judged.length} right` : `${group.length} samples`}`), ...group.map(card));
    sides.append(side);
  }
}
pair.addEventListener("input", compare);
compare();

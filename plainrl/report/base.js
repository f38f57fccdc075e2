"use strict";
// Everything on the page is built from the JSON block. Texts become text nodes, never HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const isOne = runs.length === 1;
const KINDS = { eval: "validation", eval_all: "validation, all questions", rollouts: "training" };
const kindName = (kind) => KINDS[kind] || kind.replace(/^eval_all\//, "validation, all questions, ").replace(/^eval\//, "validation, ");
const SHOWS = {
  all: ["all", () => true],
  right: ["right", (member) => member.answer === 1],
  wrong: ["wrong", (member) => member.answer !== 1],
  truncated: ["truncated", (member) => Boolean(member.isCut)],
  unformatted: ["no format", (member) => member.format === 0],
};
const NUM_COLORS = 6;
const DASHES = { "": "none", dashed: "7 4", dotted: "1.5 4.5", long: "14 4", mixed: "10 3 2 3", sparse: "4 8" };
const dashOf = (number) => Object.keys(DASHES)[number % Object.keys(DASHES).length];
const GROUPS_AT_A_TIME = 12;

function h(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

function s(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function format(value) {
  if (value === null || value === undefined) return "-";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

function duration(seconds) {
  if (seconds < 59.5) return `${format(Number(seconds.toPrecision(2)))} s`;
  const whole = Math.round(seconds);  // before it is divided, so that no part is rounded up to 60
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  const minutes = Math.round(whole / 60);
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

const swatch = (line) => h("span", { class: `swatch s${line.color} ${line.dash}` });
const section = (title, ...children) => h("section", {}, h("h2", {}, title), ...children);

function buttons(label, choices, current, choose) {
  const row = h("div", { class: "buttons", role: "group", "aria-label": label });
  for (const [key, text] of choices) {
    const button = h("button", { type: "button", "aria-pressed": String(key === current), "data-key": key }, text);
    button.addEventListener("click", () => {
      for (const other of row.children) other.setAttribute("aria-pressed", String(other === button));
      choose(key);
    });
    row.append(button);
  }
  return row;
}

function select(label, choices, current, choose) {
  const options = choices.map(([key, text]) => h("option", { value: key, selected: key === current || null }, text));
  return h("select", { "aria-label": label, onchange: (event) => choose(event.target.value) }, options);
}

// --- what is run -----------------------------------------------------------------------------------------------------

function state(run) {
  const text = run.state === "running" ? `running, as of ${data.written.slice(0, 16)}` : run.state;
  return h("span", { class: `state ${run.state.split(/[ ,]/)[0]}` }, text);
}

function head() {
  if (!isOne) {
    const columns = ["step", "first", "last", "best", "all questions", "time"];
    const cells = (run, index) => [
      h("td", {}, h("span", { class: "row" }, h("span", { class: `dot b${index % NUM_COLORS}` }), run.name)),
      h("td", {}, state(run)),
      columns.map((column) => h("td", { class: "number" }, run.summary[column])),
    ];
    return h("header", {}, h("h1", {}, `${runs.length} runs`),
      h("div", { class: "card scroll runs" }, h("table", {},
        h("thead", {}, h("tr", {}, ["run", "state", ...columns].map((name) => h("th", {}, name)))),
        h("tbody", {}, runs.map((run, index) => h("tr", {}, cells(run, index)))))),
      h("p", { class: "soft small" }, "first, last, best: validation answer reward. all questions: at the end"));
  }
  const run = runs[0];
  const facts = run.facts.map(([label, value]) =>
    h("div", {}, h("dt", {}, label), h("dd", { class: label === "command" || label === "commit" ? "code" : "" }, value)));
  const tiles = run.tiles.map((tile) => h("div", { class: "tile" }, h("div", { class: "label" }, tile.label),
    h("div", { class: "value number" }, tile.value), h("div", { class: "note" }, tile.note)));
  return h("header", {}, h("div", { class: "row" }, h("h1", {}, run.name), state(run)),
    run.ending ? h("p", { class: "soft small ending" }, run.ending) : null,
    h("dl", { class: "facts" }, facts), h("div", { class: "tiles" }, tiles));
}

function remarks() {
  const items = runs.flatMap((run) => run.remarks.map(([text, steps]) =>
    h("li", {}, isOne ? "" : `${run.name}: `, text, " ", h("span", { class: "soft" }, `(${steps})`))));
  return items.length ? h("div", { class: "callout remarks" }, h("h3", {}, "What needs attention"), h("ul", {}, items)) : null;
}

// --- curves ----------------------------------------------------------------------------------------------------------

let axis = "step";
const charts = [];

// Validation is blue and training orange, in every panel.
function colorOf(names, name) {
  const isValidation = (other) => other.startsWith("eval");
  return 2 * names.filter((other) => isValidation(other) === isValidation(name)).indexOf(name) + (isValidation(name) ? 0 : 1);
}

function linesOf(metrics) {
  const names = Object.keys(metrics);
  const lines = [];
  runs.forEach((run, place) => names.forEach((name, number) => {
    const found = run.curves.metrics[name];
    if (!found) return;
    const color = isOne ? colorOf(names, name) : place;
    const round = Math.floor(color / NUM_COLORS);  // each time the colors are used up, the dash changes
    lines.push({
      label: isOne ? metrics[name] : `${run.name}${names.length > 1 ? `, ${metrics[name]}` : ""}`,
      color: color % NUM_COLORS,
      dash: dashOf(isOne ? round : number + round * names.length),
      curves: run.curves, places: found[0], values: found[1], ...smoothing(found),
    });
  }));
  return lines;
}

// Several runs: a color for each, and a style for each metric.
function styles(labels) {
  if (labels.length < 2) return null;
  return labels.map((label, number) => h("span", {}, h("span", { class: `swatch ${dashOf(number)}` }), label));
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const found = [];
  const first = Math.ceil(low / step - 1e-9);
  for (let place = 0; place <= 2 * count; place++) {  // counted, because a tiny step would leave a value as it is
    const value = (first + place) * step;
    if (value > high + step * 1e-9) break;
    found.push(Number(value.toPrecision(12)));
  }
  return found;
}

function smoothed(values, window) {
  let sum = 0;
  return values.map((value, index) => {
    sum += value - (index >= window ? values[index - window] : 0);
    return sum / Math.min(index + 1, window);
  });
}

// A metric with more values than are shown comes with its means. They are of all values, and not of those shown.
function smoothing([, values, means, window]) {
  if (means) return { means, window };
  const length = values.length > 60 ? Math.floor(values.length / 20) : 1;
  return { means: smoothed(values, length), window: length };
}

function chart(title, metrics, low) {
  const lines = linesOf(metrics);
  const svg = s("svg", { role: "img", tabindex: "0", "aria-label": title });
  const tip = h("div", { class: "tip", hidden: "" });
  const legend = h("div", { class: "legend" }, isOne
    ? lines.map((line) => h("span", {}, swatch(line), line.label, line.window > 1 ? ` (mean of ${line.window})` : ""))
    : [runs.map((run, place) => (lines.some((line) => line.curves === run.curves)
      ? h("span", {}, swatch(lines.find((line) => line.curves === run.curves)), run.name) : null)), styles(Object.values(metrics))]);
  const box = h("figure", { class: "chart card" }, h("h3", {}, title), svg, legend, tip);
  box.style.margin = "0";
  let places = [];
  let width = 0;
  const size = { height: 210, left: 46, right: 12, top: 10, bottom: 34 };
  let x, y;

  function draw() {
    width = box.clientWidth - 32 || 360;
    const points = lines.map((line) => line.places.map((place, index) => [line.curves[axis][place], line.values[index]]));
    const all = points.flat();
    if (!all.length) return;
    let [left, right] = [Math.min(...all.map((point) => point[0])), Math.max(...all.map((point) => point[0]))];
    if (left === right) [left, right] = [left - 0.5, right + 0.5];
    let bottom = Math.min(...all.map((point) => point[1]));
    let top = Math.max(...all.map((point) => point[1]));
    if (low !== null && low !== undefined) bottom = Math.min(low, bottom);
    if (bottom === top) [bottom, top] = bottom === 0 ? [0, 1] : [bottom - Math.abs(bottom) * 0.1, top + Math.abs(top) * 0.1];
    const margin = (top - bottom) * 0.06;
    top += margin;
    if (low === null || bottom < low) bottom -= margin;
    x = (value) => size.left + ((value - left) / (right - left)) * (width - size.left - size.right);
    y = (value) => size.height - size.bottom - ((value - bottom) / (top - bottom)) * (size.height - size.top - size.bottom);
    svg.setAttribute("viewBox", `0 0 ${width} ${size.height}`);
    svg.setAttribute("height", size.height);
    svg.replaceChildren();
    for (const value of ticks(bottom, top, 5)) {
      svg.append(s("line", { class: "grid", x1: size.left, x2: width - size.right, y1: y(value), y2: y(value) }),
        s("text", { x: size.left - 8, y: y(value) + 4, "text-anchor": "end" }, format(value)));
    }
    const marks = ticks(left, right, Math.max(2, Math.min(8, width / 90)));
    for (const value of axis === "step" ? marks.filter(Number.isInteger) : marks) {
      svg.append(s("text", { x: x(value), y: size.height - size.bottom + 16, "text-anchor": "middle" }, format(value)));
    }
    const names = [...new Set(runs.map((run) => run.stepName))];
    svg.append(s("text", { x: width - size.right, y: size.height - 3, "text-anchor": "end" },
      axis === "step" ? names.join(" / ") : "minutes of steps and evaluations"));
    points.forEach((line, index) => {
      const path = (values) => line.map((point, number) => `${number ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(values[number]).toFixed(1)}`).join("");
      const values = line.map((point) => point[1]);
      const { color, dash, means, window } = lines[index];
      if (window > 1) svg.append(s("path", { class: `raw s${color}`, d: path(values) }));
      svg.append(s("path", { class: `s${color}`, d: path(means), "stroke-dasharray": DASHES[dash] }));
      if (line.length <= 30) line.forEach((point) => svg.append(s("circle", { class: `s${color}`, cx: x(point[0]), cy: y(point[1]), r: 2.6 })));
    });
    places = [...new Set(all.map((point) => point[0]))].sort((a, b) => a - b);
  }

  let shown = null;
  function show(value) {
    hide();
    if (value === null || value === undefined) return;
    shown = value;
    const group = s("g", { class: "hover" }, s("line", { class: "cursor", x1: x(value), x2: x(value), y1: size.top, y2: size.height - size.bottom }));
    const rows = [];
    let other = null;
    lines.forEach((line) => {
      const index = line.places.findIndex((place) => line.curves[axis][place] === value);
      if (index < 0) return;
      other = line.curves[axis === "step" ? "minutes" : "step"][line.places[index]];
      group.append(s("circle", { class: `s${line.color}`, cx: x(value), cy: y(line.values[index]), r: 4.2 }));
      rows.push(h("div", { class: "row" }, swatch(line), line.label, h("b", {}, format(line.values[index]))));
    });
    svg.append(group);
    const where = axis === "step" ? `step ${format(value)}, ${format(other)} min` : `${format(value)} min, step ${format(other)}`;
    tip.replaceChildren(h("div", { class: "soft" }, where), ...rows);
    tip.hidden = false;
    const place = x(value) + 16;
    const room = box.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(place < room ? place + 12 : place - tip.offsetWidth - 12, room))}px`;
    tip.style.top = `${svg.getBoundingClientRect().top - box.getBoundingClientRect().top + 6}px`;
  }
  function hide() {
    svg.querySelector(".hover")?.remove();
    tip.hidden = true;
    shown = null;
  }
  function nearest(event) {
    const at = ((event.clientX - svg.getBoundingClientRect().left) / svg.getBoundingClientRect().width) * width;
    return places.reduce((best, value) => (Math.abs(x(value) - at) < Math.abs(x(best) - at) ? value : best), places[0]);
  }
  for (const kind of ["pointermove", "pointerdown"]) svg.addEventListener(kind, (event) => places.length && show(nearest(event)));
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !places.length) return;
    event.preventDefault();
    const index = shown === null ? (step > 0 ? -1 : places.length) : places.indexOf(shown);
    show(places[Math.max(0, Math.min(places.length - 1, index + step))]);
  });
  new ResizeObserver(() => { if (box.clientWidth - 32 !== width) draw(); }).observe(box);
  charts.push(() => { hide(); draw(); });
  return box;
}

function curves() {
  const longEnough = (metrics) => linesOf(metrics).some((line) => line.values.length > 1);
  const panels = data.panels.filter((panel) => longEnough(panel.lines));
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves.metrics)))].filter((name) => longEnough({ [name]: name })).sort();
  if (!names.length) return null;
  const grid = h("div", { class: "charts" }, panels.map((panel) => chart(panel.title, panel.lines, panel.low)));
  const choices = [["", "another metric ..."], ...names.map((name) => [name, name])];
  const another = select("another metric", choices, "", (name) => {
    if (name) {
      const added = chart(name, { [name]: isOne ? "each value as logged" : name }, null);
      grid.append(added);
      charts[charts.length - 1]();
      added.scrollIntoView({ block: "nearest" });
    }
    another.value = "";
  });
  const choose = (key) => { axis = key; charts.forEach((draw) => draw()); };
  const tools = h("div", { class: "row spread axis" }, buttons("axis", [["step", "by step"], ["minutes", "by clock"]], axis, choose), another);
  tools.style.marginBottom = "12px";
  return section("Curves", tools, grid);
}

function times() {
  const bars = runs.filter((run) => run.times.length).map((run) => {
    const total = run.times.reduce((sum, [, seconds]) => sum + seconds, 0);
    const bar = h("div", { class: "bar" });
    const legend = h("div", { class: "times" });
    run.times.forEach(([label, seconds], index) => {
      const part = h("div", { class: `b${index % NUM_COLORS}`, title: `${label}: ${duration(seconds)}` });
      part.style.flex = `${seconds} 1 0`;
      bar.append(part);
      legend.append(h("span", {}, h("span", { class: `dot b${index % NUM_COLORS}` }), label,
        h("span", { class: "number soft" }, `${duration(seconds)}, ${Math.round((100 * seconds) / total)} %`)));
    });
    const box = h("div", { class: "card" }, isOne ? null : h("h3", {}, run.name), bar, legend);
    box.style.marginBottom = "10px";
    return box;
  });
  return bars.length ? section("Time by phase", ...bars) : null;
}

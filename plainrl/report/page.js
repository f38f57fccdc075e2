// --- settings --------------------------------------------------------------------------------------------------------

function table(columns, rows) {
  return h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, columns.map((name) => h("th", {}, name)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, index) => h("td", { class: "code" }, cell)))))));
}

function settings() {
  const boxes = [];
  if (!isOne) {
    const values = runs.map((run) => Object.fromEntries(run.settings));
    const keys = [...new Set(values.flatMap((of) => Object.keys(of)))].filter((key) =>
      key !== "run_name" && values.every((of) => key in of) && new Set(values.map((of) => of[key])).size > 1);
    boxes.push(h("div", { class: "card differ" }, h("h3", {}, keys.length ? "What differs between the runs" : "No setting differs"),
      keys.length ? table(["key", ...runs.map((run) => run.name)], keys.map((key) => [key, ...values.map((of) => of[key])])) : null));
  }
  for (const run of runs) {
    const { name, changed, isKnown } = run.preset;
    const title = isKnown ? `${isOne ? "" : `${run.name}: `}${changed.length ? "what differs from" : "nothing differs from"} preset ${name}`
      : `${isOne ? "" : `${run.name}: `}preset ${name} is not known here`;
    boxes.push(h("div", { class: "card changed" }, h("h3", {}, title),
      changed.length ? table(["key", "preset", "this run"], changed) : null,
      h("details", {}, h("summary", {}, `all ${run.settings.length} settings`), table(["key", "value"], run.settings))));
  }
  boxes.forEach((box) => { box.style.marginBottom = "10px"; });
  return section("Settings", ...boxes);
}

refresh();
document.getElementById("page").append(...[head(), remarks(), curves(), times(), browser, settings(),
  h("footer", {}, `Written ${data.written} from metrics.jsonl and samples/ of ${runs.map((run) => run.folder).join(", ")}. `,
    "This page loads nothing from the network.")].filter(Boolean));
charts.forEach((draw) => draw());

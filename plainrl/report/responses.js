// --- responses -------------------------------------------------------------------------------------------------------

const start = new URLSearchParams(location.hash.slice(1));
const filter = {
  run: Number(start.get("run")) || 0, kind: start.get("kind") || "", step: start.get("step") || "",
  show: start.get("show") || "all", search: start.get("search") || "", question: start.get("question") || "",
};

function marked(text) {
  const query = filter.search.toLowerCase();
  if (!query) return [text];
  const parts = [];
  const lower = text.toLowerCase();
  let from = 0;
  for (let at = lower.indexOf(query); at >= 0 && parts.length < 200; at = lower.indexOf(query, from)) {
    parts.push(text.slice(from, at), h("mark", {}, text.slice(at, at + query.length)));
    from = at + query.length;
  }
  return [...parts, text.slice(from)];
}

function boxedEnd(text, start) {
  let depth = 0;
  for (let index = start; index < text.length; index += 1) {
    if (text[index] === "{") depth += 1;
    else if (text[index] === "}" && --depth === 0) return index + 1;
  }
  return text.length;
}

// The parts of a response: what it thinks, its answer, and the tags between them.
function parts(text) {
  const found = [];
  const push = (kind, part) => part && found.push(h("span", { class: kind }, marked(part)));
  const thought = text.indexOf("</think>");
  const opened = text.lastIndexOf("<answer>");
  if (opened >= 0) {
    const closed = text.indexOf("</answer>", opened);
    const end = closed < 0 ? text.length : closed;
    const middle = thought >= 0 && thought < opened ? thought : opened;
    push("think", text.slice(0, middle));
    push("tag", text.slice(middle, opened + 8));
    push("answer", text.slice(opened + 8, end));
    push("tag", text.slice(end, end + 9));
    push("rest", text.slice(end + 9));
    return found;
  }
  if (thought >= 0) {
    push("think", text.slice(0, thought));
    push("tag", text.slice(thought, thought + 8));
    push("rest", text.slice(thought + 8));
    return found;
  }
  const boxed = text.lastIndexOf("\\boxed{");
  if (boxed >= 0) {
    const end = boxedEnd(text, boxed);
    push("think", text.slice(0, boxed));
    push("answer", text.slice(boxed, end));
    push("rest", text.slice(end));
    return found;
  }
  push("rest", text);
  return found;
}

function badges(member) {
  const list = [h("span", { class: `badge ${member.answer === 1 ? "right" : "wrong"}` }, member.answer === 1 ? "right" : "wrong")];
  if (member.format === 0) list.push(h("span", { class: "badge" }, "no format"));
  if (member.isCut) list.push(h("span", { class: "badge cut" }, "truncated"));
  return list;
}

function numbers(member) {
  const list = [`reward ${format(member.reward)}`];
  if (member.advantage !== undefined) list.push(`advantage ${member.advantage > 0 ? "+" : ""}${format(Number(member.advantage.toFixed(3)))}`);
  if (member.tokens !== undefined) list.push(`${format(member.tokens)} tokens`);
  if (member.entropy !== undefined) list.push(`entropy ${format(member.entropy)}`);
  for (const [name, value] of Object.entries(member.more || {})) list.push(`${name} ${format(value)}`);
  return h("div", { class: "small soft number numbers" }, list.join(" · "));
}

function memberCard(member) {
  const response = h("div", { class: "response" }, parts(member.response.trimStart()));
  const card = h("article", { class: `member ${member.answer === 1 ? "right" : "wrong"}` },
    h("div", { class: "row" }, badges(member)), numbers(member), response);
  if (member.response.length > 700 || member.response.split("\n").length > 12) {
    response.classList.add("folded");
    const answer = response.querySelector(".answer");
    if (answer) card.append(h("div", { class: "small at-end" }, h("span", { class: "soft" }, "answer "), answer.cloneNode(true)));
    const more = h("button", { type: "button", class: "plain" }, "show all of it");
    more.addEventListener("click", () => {
      more.textContent = response.classList.toggle("folded") ? "show all of it" : "show less";
    });
    card.append(more);
  }
  return card;
}

function groupCard(run, group, members) {
  const numRight = group.members.filter((member) => member.answer === 1).length;
  const [before, after] = group.hasTemplate ? run.template : ["", ""];
  const follow = h("button", { type: "button", class: "plain follow" }, "follow this question");
  follow.addEventListener("click", () => {
    Object.assign(filter, { question: group.question, step: "", kind: "", show: "all", search: "" });
    refresh();
    browser.scrollIntoView();
  });
  const count = group.members.length > 1 ? `, ${numRight} of ${group.members.length} right` : "";
  const isSingle = group.members.length === 1;
  return h("article", { class: `card group ${isSingle ? "single" : ""}` }, h("div", {},
    h("div", { class: `row ${isSingle ? "" : "spread"}` },
      h("span", { class: "small soft" }, `${kindName(group.kind)}, step ${group.step}${count}`), filter.question ? null : follow),
    h("div", { class: "question" }, marked(group.question)),
    h("div", { class: "small" }, h("span", { class: "soft" }, "ground truth "), h("b", { class: "truth" }, marked(group.truth))),
    group.hasTemplate ? h("details", {}, h("summary", {}, "whole prompt"),
      h("div", { class: "prompt" }, h("span", { class: "soft" }, before), group.question, h("span", { class: "soft" }, after))) : null),
    h("div", { class: "members" }, members.map(memberCard)));
}

const browser = h("section", { class: "responses" });

function remember() {
  const kept = Object.entries(filter).filter(([key, value]) => value && value !== "all" && !(key === "run" && value === 0));
  history.replaceState(null, "", kept.length ? `#${new URLSearchParams(kept)}` : "#");
}

function refresh() {
  remember();
  const run = runs[filter.run] || runs[0];
  const kinds = [...new Set(run.groups.map((group) => group.kind))];
  if (!runs.some((other) => other.groups.length)) return browser.replaceChildren();
  // Another run may have some: the choice of the run stays, and stands in the address.
  if (!filter.question && kinds.length && !kinds.includes(filter.kind)) [filter.kind, filter.step] = [kinds[0], ""];
  const ofKind = run.groups.filter((group) => (filter.question ? group.question === filter.question : group.kind === filter.kind));
  const steps = [...new Set(ofKind.map((group) => group.step))].sort((a, b) => a - b);
  const isEveryStep = filter.question || filter.step === "every";
  if (!isEveryStep && !steps.includes(Number(filter.step))) filter.step = "";
  const step = filter.step === "" ? steps[steps.length - 1] : Number(filter.step);
  const inStep = isEveryStep ? ofKind : ofKind.filter((group) => group.step === step);
  const query = filter.search.toLowerCase();
  const isFound = (group, member) => [group.question, group.truth, member.response].some((text) => text.toLowerCase().includes(query));
  const searched = inStep.map((group) => [group, query ? group.members.filter((member) => isFound(group, member)) : group.members]);
  const counts = Object.fromEntries(Object.entries(SHOWS).map(([key, [, belongs]]) =>
    [key, searched.reduce((sum, [, members]) => sum + members.filter(belongs).length, 0)]));
  const belongs = (SHOWS[filter.show] || SHOWS.all)[1];
  const found = searched.map(([group, members]) => [group, members.filter(belongs)]).filter(([, members]) => members.length);

  const set = (changes) => { Object.assign(filter, changes); refresh(); };
  const controls = [];
  if (!isOne) controls.push(select("run", runs.map((other, index) => [String(index), other.name]), String(filter.run), (key) => set({ run: Number(key), question: "" })));
  if (filter.question) {
    controls.push(h("button", { type: "button", class: "unfollow", onclick: () => set({ question: "" }) }, "back to all questions"));
  } else {
    if (kinds.length > 1) controls.push(select("kind", kinds.map((kind) => [kind, kindName(kind)]), filter.kind, (key) => set({ kind: key, step: "" })));
    if (steps.length > 1) {
      const choices = [["every", "every step"], ...steps.map((value) => [String(value), `step ${value}`])];
      controls.push(select("step", choices, isEveryStep ? "every" : String(step), (key) => set({ step: key })));
    }
  }
  const chips = buttons("show", Object.entries(SHOWS).map(([key, [label]]) => [key, `${label} ${counts[key]}`]), filter.show, (key) => set({ show: key }));
  const input = h("input", { type: "search", placeholder: "search", "aria-label": "search", value: filter.search });
  let timer = 0;
  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      set({ search: input.value });
      const again = browser.querySelector("input");
      again.focus();
      again.setSelectionRange(again.value.length, again.value.length);
    }, 150);
  });
  const list = h("div", { class: "list" });
  const more = h("button", { type: "button", class: "more" });
  more.style.marginTop = "14px";
  let numShown = 0;
  function showMore() {
    found.slice(numShown, numShown + GROUPS_AT_A_TIME).forEach(([group, members]) => list.append(groupCard(run, group, members)));
    numShown = Math.min(found.length, numShown + GROUPS_AT_A_TIME);
    more.hidden = numShown === found.length;
    more.textContent = `show more (${found.length - numShown} left)`;
  }
  more.addEventListener("click", showMore);
  showMore();
  const numHere = run.groups.reduce((sum, group) => sum + group.members.length, 0);
  const notes = [`${numHere} of ${run.numResponses} responses are in this page; all are in samples/ of the run.`];
  if (run.numDamaged) notes.push(`${run.numDamaged} damaged lines are left out.`);
  browser.replaceChildren(h("h2", {}, filter.question ? "One question, step by step" : "Responses"),
    h("div", { class: "tools row" }, controls, chips, input), list, found.length ? more : h("p", { class: "soft" }, "None."),
    h("p", { class: "soft small notes" }, notes.join(" ")));
  browser.querySelector(".notes").style.marginTop = "12px";
}

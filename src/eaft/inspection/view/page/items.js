// The items of an evaluation: lists of regressions, gains, all and drift; one item with both models' answers.

import { url } from "./api.js";
import { pager } from "./examples.js";
import { announce, choice, count, fill, h, later, many, number, oneLine, part, select, snippets, table } from "./dom.js";
import { change, state } from "./state.js";

const ROWS = 25; // on a page
const LISTS = {
  regressions: "the tuned model's score is lower than the base model's",
  gains: "the tuned model's score is higher than the base model's",
  all: "every item",
  answers: "answers to held-out rows, not graded",
  drift: "the base model's own answers that drift was measured on, the most drifted first",
};
const GRADED = { regressions: 1, gains: 1 };
const score = (value) => (value === null ? "–" : d3.format(".3~g")(value));
const plain = (value) => (typeof value === "string" ? value : (JSON.stringify(value, null, 1) ?? ""));

export function mountItems(root) {
  const chosen = h("div", { class: "row" }),
    search = h("input", {
      type: "search",
      placeholder: "search prompts and answers",
      "aria-label": "Search the items",
      oninput: later((event) => change({ find: event.target.value }), 250),
    }),
    list = h("div", { class: "list" }),
    opened = h("section", { class: "opened", "aria-label": "An item" }),
    pane = h("div", { class: "examples-view" }, list, opened);
  root.append(h("div", { class: "row items-bar" }, h("h2", {}, "Items"), chosen, search), pane);
  let run,
    rows = [],
    pages = 1;

  const listing = part(list, (answer) => {
    rows = answer.rows;
    pages = Math.max(1, Math.ceil(answer.total / ROWS));
    announce(many(answer.total, "item"));
    root.hidden = !answer.notes.length && d3.sum(Object.values(answer.counts)) === 0;
    drawChoices(answer);
    return [
      h("p", { class: "quiet" }, LISTS[answer.which]),
      ...answer.notes.map((note) => h("p", { class: "warning" }, note)),
      drawTable(answer),
      answer.total > ROWS && pager(answer.total, ROWS, "item"),
    ];
  });
  const text = part(opened, (entry) => drawEntry(entry, run, move));

  function drawChoices({ which, counts, tasks }) {
    const shown = Object.keys(LISTS).filter(
      (name) => counts[name] > 0 || (run.kind !== "tune" && (name === "all" || (run.base && name in GRADED))),
    );
    const options = shown.map((name) => [name, `${name} ${count(counts[name])}`]);
    const names = Object.keys(tasks).sort();
    fill(
      chosen,
      run.pairings.length > 1 &&
        select("Model", run.pairings.map(pairing), state.of, (of) => change({ of, item: "" })),
      choice("List", options, which, (name) => change({ list: name, item: "" })),
      names.length > 1 &&
        select(
          "Task",
          [["", "all tasks"], ...names.map((name) => [name, `${name} (${count(tasks[name])})`])],
          tasks[state.task] ? state.task : "",
          (task) => change({ task, item: "" }),
        ),
    );
  }

  function move(step) {
    const here = rows.findIndex((row) => `${row.number}` === state.item);
    const next = rows[here < 0 ? 0 : here + step];
    if (next) change({ item: `${next.number}` });
  }

  function update(results = run) {
    run = results;
    root.hidden = !run?.pairings.length;
    if (root.hidden) return;
    const from = { name: run.name, of: state.of };
    const offset = (state.page - 1) * ROWS;
    listing.ask(url("items", { ...from, list: state.list, task: state.task, search: state.find, offset, limit: ROWS }));
    if (document.activeElement !== search) search.value = state.find;
    list
      .querySelectorAll("tr[data-example]")
      .forEach((row) => row.setAttribute("aria-current", `${row.dataset.example === state.item}`));
    pane.classList.toggle("has-open", state.item !== "");
    opened.hidden = state.item === "";
    if (state.item !== "") text.ask(url("item", { ...from, item: state.item }));
  }

  const keys = {
    j: () => move(1),
    k: () => move(-1),
    Escape: () => change({ item: "" }),
    "[": () => state.page > 1 && change({ page: state.page - 1 }),
    "]": () => state.page < pages && change({ page: state.page + 1 }),
  };
  return { update, keys };
}

const pairing = ({ objective, seed, step }, index) => [
  `${index}`,
  `${objective}${seed === null ? "" : `, seed ${seed}`}, step ${step}`,
];

function drawTable({ rows }) {
  const texts = snippets(rows);
  const has = (name) => rows.some((row) => row[name] !== null);
  const columns = [
    { title: "task", class: "long-name", cell: (row) => row.task },
    has("doc_id") && { title: "item", numeric: true, cell: (row) => (row.doc_id === null ? "" : `${row.doc_id}`) },
    has("before") && { title: "base", numeric: true, cell: (row) => score(row.before) },
    has("after") && { title: has("before") ? "tuned" : "score", numeric: true, cell: (row) => score(row.after) },
    has("drift") && { title: "drift", numeric: true, cell: (row) => number(row.drift, 4), help: "nats per token" },
    has("tokens") && { title: "tokens", numeric: true, cell: (row) => count(row.tokens), help: "of the answer" },
    {
      title: "prompt",
      class: "text-cell",
      cell: (row, index) => h("button", { class: "plain", "data-key": `item ${row.number}` }, texts[index]),
    },
  ];
  const onrow = (row) => ({
    "data-example": row.number,
    "aria-current": `${`${row.number}` === state.item}`,
    onclick: () => change({ item: `${row.number}` }),
  });
  const one = new Set(rows.map(({ task }) => task)).size < 2;
  const shown = columns.filter((column) => column && !(one && column.title === "task"));
  return table("Items", shown, rows.map((row) => ({ ...row, snippet: oneLine(row.snippet) })), {
    onrow,
    empty: "No item matches.",
  });
}

// Text as it is; a long prompt is shown from its end, where the question is
function said(title, value, css = "") {
  const box = h("div", { class: `said ${css}`, dir: "auto", tabindex: 0, "aria-label": title }, plain(value));
  if (css === "prompt") requestAnimationFrame(() => (box.scrollTop = box.scrollHeight));
  return h("div", {}, h("h3", {}, title), box);
}

function drawEntry(entry, run, move) {
  const { before, after, drift } = entry;
  const facts = [
    drift !== null && `drift ${number(drift, 4)} nats per token over ${many(entry.tokens ?? 0, "token")}`,
    before && after && before.score !== null && `score ${score(before.score)} → ${score(after.score)}`,
    !before && after && `score ${score(after.score)}`,
    ...[
      ["base", before],
      ["tuned", after],
    ].flatMap(([who, side]) => side?.cut.length > 0 && `cut to fit, ${who}: ${side.cut.join(", ")}`),
  ];
  const name = drift === null ? entry.task : "Prompt for drift";
  return [
    h(
      "div",
      { class: "row" },
      h("h2", {}, name, entry.doc_id === null ? "" : h("span", { class: "quiet" }, ` item ${entry.doc_id}`)),
      h("span", { class: "spring" }),
      h("button", { "data-key": "previous", "aria-label": "Previous item (k)", onclick: () => move(-1) }, "↑"),
      h("button", { "data-key": "next", "aria-label": "Next item (j)", onclick: () => move(1) }, "↓"),
      h("button", { "data-key": "close", "aria-label": "Close the item (Escape)", onclick: () => change({ item: "" }) }, "×"),
    ),
    h("p", { class: "quiet" }, facts.filter(Boolean).join(" · ")),
    said("Prompt", entry.prompt, "prompt"),
    entry.target !== null && !chosenOf(entry) && said(graded(after ?? before) ? "Right answer" : "The row's own answer", entry.target),
    drift !== null
      ? said("The base model's own answer", before.response)
      : h(
          "div",
          { class: "answers" },
          before && said(`Base model${graded(before)}`, before.response),
          after && said(`${run.base ? "Tuned model" : "Answer"}${graded(after)}`, after.response, lost(entry)),
        ),
    choices(entry),
    filters(entry),
  ];
}
const graded = (side) => (side.score === null ? "" : `: ${score(side.score)}`);
const lost = ({ before, after }) => (before && after.score < before.score ? "lost" : "");

// The number of the right choice, where the task is multiple choice
const chosenOf = ({ before, after, target }) =>
  Number.isInteger(target) && (before?.choices ?? after?.choices) ? target + 1 : null;

function choices(entry) {
  const { before, after, target } = entry;
  const all = after?.choices ?? before?.choices;
  if (!all) return null;
  const of = (side) => (index) => number(side.choices?.[index], 2);
  const column = (title, side) => side && { title, numeric: true, cell: of(side) };
  const columns = [
    { title: "choice", cell: (index) => [`${index + 1}`, index === target && h("b", {}, " right")] },
    column("base", before),
    column(before ? "tuned" : "log-likelihood", after),
  ];
  return h("div", {}, h("h3", {}, "Log-likelihood of each choice, nats"), table("Choices", columns.filter(Boolean), d3.range(all.length)));
}

function filters({ before, after }) {
  const names = Object.keys(after?.scores ?? {});
  if (!names.length) return null;
  const columns = [
    { title: "read by", cell: (name) => name },
    before && { title: "base", numeric: true, cell: (name) => score(before.scores?.[name] ?? null) },
    { title: before ? "tuned" : "score", numeric: true, cell: (name) => score(after.scores[name]) },
  ];
  return h("div", {}, h("h3", {}, "Scores by filter"), table("Filters", columns.filter(Boolean), names));
}

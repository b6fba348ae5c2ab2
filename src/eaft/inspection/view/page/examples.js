// The examples as a table, which the server sorts and filters, and one example as text with coloured tokens.

import { url } from "./api.js";
import { announce, choice, count, fileName, h, many, number, part, select, share, snippets, table, terms } from "./dom.js";
import { change, selection, state } from "./state.js";
import { PAINTS, example as exampleText } from "./text.js";

export const ROWS = 50; // on a page

export default {
  name: "examples",
  title: "Examples",
  has: (folder) => folder.kind !== "runs",
  mount(root, folder) {
    const list = h("section", { class: "list", "aria-label": "Examples" }),
      opened = h("section", { class: "opened", "aria-label": "An example" });
    root.classList.add("examples-view");
    root.append(list, opened);
    let rows = [],
      pages = 1;
    const listing = part(list, (answer) => {
      rows = answer.rows;
      pages = Math.max(1, Math.ceil(answer.total / ROWS));
      announce(many(answer.total, "example"));
      return [drawTable(answer), pager(answer.total, ROWS, "example")];
    });
    let lastAt;
    const text = part(opened, (answer) => {
      const shown = exampleText(answer, paintOf(answer), state.at);
      const at = `${state.example} ${state.at}`;
      if (state.at && at !== lastAt) requestAnimationFrame(shown.focusToken);
      lastAt = at;
      return drawExample(folder, answer, shown, move);
    });

    function move(step) {
      const here = rows.findIndex((row) => `${row.example}` === state.example);
      const next = rows[here < 0 ? 0 : here + step];
      if (next) change({ example: `${next.example}`, at: "" });
    }

    let drawn;
    function update() {
      root.classList.toggle("has-open", state.example !== "");
      listing.ask(
        url(
          "examples",
          selection({ sort: state.sort, order: state.order, offset: (state.page - 1) * ROWS, limit: ROWS }),
        ),
      );
      list
        .querySelectorAll("tr[data-example]")
        .forEach((row) => row.setAttribute("aria-current", `${row.dataset.example === state.example}`));
      opened.hidden = state.example === "";
      if (state.example === "") return;
      const gate = state.paint === "weight" ? { gate: state.gate, params: JSON.stringify(state.params) } : {};
      text.ask(url("example", { example: state.example, model: state.model, ...gate }));
      const now = state.paint + state.raw + state.at;
      if (drawn !== now) text.redraw();
      drawn = now;
    }
    update.keys = {
      j: () => move(1),
      k: () => move(-1),
      Escape: () => change(state.example ? { example: "", at: "" } : { box: "" }),
      "[": () => state.page > 1 && change({ page: state.page - 1 }),
      "]": () => state.page < pages && change({ page: state.page + 1 }),
    };
    return update;
  },
};

// The chosen colouring, or another if this answer does not have it
function paintOf({ tokens }) {
  if (state.paint === "weight" && !tokens.some((item) => item.weight !== null)) return "prob";
  if (state.paint === "change" && !tokens.some((item) => item.base_log_prob !== null)) return "prob";
  return PAINTS[state.paint] ? state.paint : "prob";
}

function drawTable({ rows }) {
  const numeric = (title, sort, cell, help, optional) => ({
    title,
    sort,
    numeric: true,
    cell: (row) => cell(row[sort]),
    help,
    class: optional && "optional",
  });
  const sorted = {
    by: state.sort,
    order: state.order,
    choose: (by) => change({ sort: by, order: state.sort === by && state.order === "desc" ? "asc" : "desc", page: 1 }),
  };
  const columns = [
    numeric("row", "row", count, "of the data set"),
    { title: "source", class: "optional long-name", cell: (row) => fileName(row.source) },
    numeric("tokens", "tokens", count, null, true),
    numeric("labelled", "labelled", count, "tokens that are trained on", true),
    numeric("cut", "cut", (value) => (value ? count(value) : ""), "tokens lost to the maximal length", true),
    numeric("nll", "nll", number, "mean over its labelled tokens, nats"),
    numeric(terms.entropy, "entropy", number, "mean over its labelled tokens, nats", true),
    numeric("conflicts", "conflict_share", share, "share of its tokens that are confident conflicts"),
    numeric("of its nll", "conflict_nll_share", share, "share of its nll that lies in confident conflicts"),
    {
      title: "text",
      class: "text-cell",
      cell: (row, index) => h("button", { class: "plain", "data-key": `row ${row.example}` }, texts[index]),
    },
  ];
  const texts = snippets(rows);
  const onrow = (row) => ({
    "data-example": row.example,
    "aria-current": `${`${row.example}` === state.example}`,
    onclick: () => change({ example: `${row.example}`, at: "" }),
  });
  return table("Examples", columns, rows, { onrow, sorted, empty: "No example matches all filters." });
}

export function pager(total, rows, what) {
  const pages = Math.max(1, Math.ceil(total / rows));
  const go = (page) => change({ page: Math.max(1, Math.min(page, pages)) });
  return h(
    "div",
    { class: "row pager" },
    h(
      "button",
      { disabled: state.page <= 1, "data-key": "previous page", onclick: () => go(state.page - 1) },
      "← previous",
    ),
    h(
      "label",
      { class: "inline" },
      "page ",
      h("input", {
        type: "number",
        min: 1,
        max: pages,
        value: state.page,
        "data-key": "page",
        onchange: (event) => go(Number(event.target.value)),
      }),
      ` of ${count(pages)}`,
    ),
    h(
      "button",
      { disabled: state.page >= pages, "data-key": "next page", onclick: () => go(state.page + 1) },
      "next →",
    ),
    h("span", { class: "quiet" }, many(total, what)),
  );
}

function drawExample(folder, answer, shown, move) {
  const paint = paintOf(answer);
  const tuned = folder.models.find(({ name }) => name !== "base");
  const paints = [
    ["prob", "probability"],
    ["entropy", terms.entropy],
    ["weight", "gate's weight"],
    ...(tuned ? [["change", "change after training"]] : []),
  ];
  const choosePaint = (chosen) =>
    change({ paint: chosen, ...(chosen === "change" && state.model === "base" ? { model: tuned.name } : {}) });
  const facts = [
    `${count(answer.labelled)} of ${count(answer.tokens.length)} tokens labelled`,
    answer.cut > 0 && `${count(answer.cut)} cut off at max_length`,
    `nll ${number(answer.nll)}`,
    `${terms.entropy} ${number(answer.entropy)}`,
    `conflicts ${share(answer.conflict_share)} of the tokens, ${share(answer.conflict_nll_share)} of the nll`,
  ];
  return [
    h(
      "div",
      { class: "row" },
      h(
        "h2",
        {},
        answer.origin === "rollouts" ? "The model's answer to row " : "Row ",
        `${answer.row}`,
        h("span", { class: "quiet" }, ` ${fileName(answer.source)}`),
      ),
      h("span", { class: "spring" }),
      h("button", { "data-key": "previous", "aria-label": "Previous example (k)", onclick: () => move(-1) }, "↑"),
      h("button", { "data-key": "next", "aria-label": "Next example (j)", onclick: () => move(1) }, "↓"),
      h(
        "button",
        {
          "data-key": "close",
          "aria-label": "Close the example (Escape)",
          onclick: () => change({ example: "", at: "" }),
        },
        "×",
      ),
    ),
    h("p", { class: "quiet" }, facts.filter(Boolean).join(" · ")),
    h(
      "div",
      { class: "row" },
      choice("Colour of the tokens", paints, paint, choosePaint),
      paint === "weight" &&
        select(
          "Gate",
          folder.gates.map(({ name }) => [name, name]),
          state.gate,
          (gate) => change({ gate, params: {} }),
        ),
    ),
    h(
      "p",
      { class: `key paint-${paint} quiet` },
      PAINTS[paint].ends[0],
      h("i", { class: "ramp" }),
      PAINTS[paint].ends[1],
      h("span", { class: "labelled conflict" }, "confident conflict"),
      h("span", { class: "unlabelled" }, "no label"),
    ),
    shown,
    answer.messages && drawMessages(answer.messages),
  ];
}

function toggleRaw(event) {
  event.preventDefault(); // redrawing opens or closes it
  change({ raw: state.raw ? "" : "open" });
}

// The row of the data set, before the template
const drawMessages = (messages) =>
  h(
    "details",
    { class: "raw", open: state.raw !== "" },
    h("summary", { "data-key": "raw", onclick: toggleRaw }, "The row as it was"),
    h("pre", { tabindex: 0, "aria-label": "The row as it was" }, JSON.stringify(messages, null, 2)),
  );

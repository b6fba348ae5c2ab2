// The tokens of a group, and the places of one token in context.

import { url } from "./api.js";
import { announce, choice, count, fill, h, many, number, oneLine, part, share, table, terms, token, wanted } from "./dom.js";
import { pager } from "./examples.js";
import { change, selection, state } from "./state.js";

const GROUPS = [
  ["conflict", "confident conflicts"],
  ["high_entropy", "high entropy"],
  ["low_entropy", "low entropy"],
  ["", "all"],
];
const MEANING = {
  conflict: "The model is sure of another token: entropy below 0.5 nats, probability of the label below 0.1.",
  high_entropy: "The model is unsure: entropy of at least 2 nats.",
  low_entropy: "The model is sure: entropy of at most 0.5 nats.",
  "": "All labelled tokens of the selection.",
};
const TOKENS = 200,
  PLACES = 50;

export default {
  name: "tokens",
  title: "Tokens",
  has: (folder) => folder.kind !== "runs",
  mount(root, folder) {
    const head = h("div", {}),
      list = h("section", { "aria-label": "Tokens" }),
      places = h("section", { class: "places", "aria-label": "Places in context" });
    root.append(head, h("div", { class: "beside even" }, list, places));
    const listing = part(list, (answer) => [tokenTable(folder, answer)]);
    const concordance = part(places, (answer) => drawPlaces(answer));
    return function update() {
      root.classList.toggle("has-token", state.token !== "");
      fill(
        head,
        h(
          "div",
          { class: "row" },
          choice("Group", GROUPS, state.group, (group) => change({ group, token: "" })),
          h("span", { class: "quiet" }, MEANING[state.group]),
        ),
      );
      listing.ask(url("tokens", selection({ without: ["token"], group: state.group, limit: TOKENS })));
      list
        .querySelectorAll("tr[data-token]")
        .forEach((row) => row.setAttribute("aria-current", `${row.dataset.token === state.token}`));
      if (state.token)
        concordance.ask(
          url("concordance", selection({ group: state.group, offset: (state.page - 1) * PLACES, limit: PLACES })),
        );
      else concordance.show([h("p", { class: "quiet" }, "Choose a token to see its places in context.")]);
    };
  },
};

function tokenTable(folder, { total, rows }) {
  announce(many(total, "token"));
  const onrow = (row) => ({
    "data-token": row.token_id,
    "aria-current": `${`${row.token_id}` === state.token}`,
    onclick: () => change({ token: `${row.token_id}` }),
  });
  return h(
    "div",
    {},
    table(
      "Tokens",
      [
        {
          title: "token",
          cell: (row) => h("button", { class: "plain", "data-key": `token ${row.token_id}` }, token(row.text)),
        },
        { title: "count", numeric: true, cell: (row) => count(row.count) },
        {
          title: "share",
          numeric: true,
          class: "optional",
          cell: (row) => share(row.share),
          help: "of the group's tokens",
        },
        {
          title: "lift",
          numeric: true,
          class: "optional",
          cell: (row) => (row.lift === null ? "–" : `${number(row.lift, 1)}×`),
          help: "its share of the group over its share of all tokens",
        },
        { title: "nll", numeric: true, cell: (row) => number(row.nll), help: "mean, nats" },
        { title: "the model wanted", cell: (row) => wanted(row.wanted) },
      ],
      rows,
      { onrow },
    ),
    total > rows.length && h("p", { class: "quiet" }, `The first ${count(rows.length)} of ${count(total)}.`),
  );
}

function drawPlaces({ total, rows }) {
  const place = (row) =>
    h(
      "tr",
      { onclick: () => open(row) },
      h("td", { class: "left" }, h("bdi", {}, oneLine(row.left))),
      h(
        "td",
        { class: "middle" },
        h(
          "button",
          {
            class: "plain",
            title: `probability ${share(row.prob)}, ${terms.entropy} ${number(row.entropy)}`,
            "data-key": `place ${row.example} ${row.position}`,
          },
          token(row.text),
        ),
      ),
      h("td", { class: "right" }, h("bdi", {}, oneLine(row.right))),
      h("td", {}, token(row.first_text)),
      h("td", { class: "numeric optional" }, share(row.prob)),
    );
  const open = (row) => change({ view: "examples", example: `${row.example}`, at: `${row.position}` });
  return [
    h(
      "div",
      { class: "scroll" },
      h(
        "table",
        { class: "concordance", "aria-label": "Places in context" },
        h(
          "thead",
          {},
          h(
            "tr",
            {},
            h("th", { class: "left" }, "before"),
            h("th", { class: "middle" }, "token"),
            h("th", {}, "after"),
            h("th", {}, "wanted"),
            h("th", { class: "numeric optional" }, "p"),
          ),
        ),
        h("tbody", {}, rows.map(place)),
      ),
    ),
    pager(total, PLACES, "place"),
  ];
}

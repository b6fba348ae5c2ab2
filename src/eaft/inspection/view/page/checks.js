// The checks of `eaft inspect`, with the first rows that each one names.

import { get, url } from "./api.js";
import { count, h } from "./dom.js";
import { ROWS } from "./examples.js";
import { change, noFilters } from "./state.js";

const checksOf = ({ summary }) => summary?.checks ?? [];

export default {
  name: "checks",
  title: "Checks",
  has: (folder) => checksOf(folder).length > 0,
  badge: (folder) => checksOf(folder).filter(({ count: rows }) => rows > 0).length,
  mount(root, folder) {
    const open = async (row) => {
      const { rows } = await get(url("examples", { row, limit: 1 })).catch(() => ({ rows: [] }));
      change({
        ...noFilters(),
        view: "examples",
        origin: "data",
        sort: "row",
        order: "asc",
        page: 1 + Math.floor(row / ROWS),
        example: rows.length ? `${rows[0].example}` : "",
        at: "",
      });
    };
    const item = ({ title, count: rows, text, rows: first }) =>
      h(
        "li",
        { class: rows ? "failed" : "fine" },
        h("h2", {}, title, " ", h("span", { class: "quiet" }, rows ? count(rows) : "none")),
        h("p", { class: "quiet" }, text),
        rows > 0 &&
          h(
            "p",
            {},
            "rows ",
            first.map((row) => h("button", { class: "chip", onclick: () => open(row) }, `${row}`)),
          ),
      );
    const sorted = [...checksOf(folder)].sort((a, b) => (b.count > 0) - (a.count > 0));
    root.append(h("ul", { class: "checks" }, sorted.map(item)));
    return () => {};
  },
};

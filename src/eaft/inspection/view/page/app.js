// The page: asks what the folder has, and shows the view that the address names.

import { get, url } from "./api.js";
import checks from "./checks.js";
import { choice, eachFrame, fileName, fill, h, many, terms } from "./dom.js";
import examples from "./examples.js";
import { mountFilters } from "./filters.js";
import gates from "./gates.js";
import landscape from "./landscape.js";
import runs from "./runs.js";
import { change, selection, state, subscribe } from "./state.js";
import { hideTip } from "./tip.js";
import tokens from "./tokens.js";

const VIEWS = [landscape, gates, examples, tokens, runs, checks];
const KEYS = [
  ["1 – 6", "the views"],
  ["j, k", "next, previous example or item"],
  ["[, ]", "previous, next page of examples or items"],
  ["← →", "in an example: previous, next token"],
  ["c", "in an example: the next confident conflict"],
  ["← → ↑ ↓", "in the plane: move the box by a bin; with shift, its upper right corner"],
  ["/", "search"],
  ["Esc", "close the example or item, or remove the box"],
  ["t", "dark or light"],
  ["?", "this help"],
];
// The keys of each view that stand beside the tabs
const LIST_KEYS = [["j k", "next, previous"], ["[ ]", "pages"], ["Esc", "close"]]; // prettier-ignore
const HINTS = {
  landscape: [["← → ↑ ↓", "move the box"], ["Esc", "remove it"]], // prettier-ignore
  examples: [...LIST_KEYS, ["c", "next conflict"]],
  runs: LIST_KEYS,
};
const place = (id) => document.getElementById(id);

// The server has put the token of `/?token=` into a cookie, so it is removed from the address and the history
if (location.search) history.replaceState(null, "", location.pathname + location.hash);

const theme = {
  chosen: () => document.documentElement.dataset.theme ?? "",
  set(name) {
    if (name) document.documentElement.dataset.theme = name;
    else delete document.documentElement.dataset.theme;
    try {
      localStorage.setItem("eaft theme", name);
    } catch {
      // without storage, the choice lasts as long as the page
    }
    drawTools();
    dispatchEvent(new Event("theme"));
  },
};
try {
  const kept = localStorage.getItem("eaft theme");
  if (kept) document.documentElement.dataset.theme = kept;
} catch {
  // without storage, the theme is the default
}

let folder, updateFilters;
const mounted = new Map();

async function start() {
  const main = place("main");
  try {
    folder = await get(url("folder"));
  } catch (error) {
    return fill(
      main,
      h(
        "p",
        { class: "error", role: "alert" },
        error.message,
        " ",
        h("button", { onclick: () => start() }, "Try again"),
      ),
    );
  }
  main.replaceChildren();
  document.title = `${folder.name} · eaft view`;
  place("name").textContent = folder.name;
  place("what").textContent = describe(folder);
  terms.entropy = folder.entropy_name ?? terms.entropy;
  place("absent").textContent = folder.absent ?? "";
  place("absent").hidden = !folder.absent;
  document.body.dataset.kind = folder.kind;
  if (folder.kind !== "runs") updateFilters = mountFilters(place("filters"), folder);
  drawHelp();
  subscribe(eachFrame(update));
  update();
}

function describe({ counts, models, run, scored_rows: scored }) {
  if (!counts?.data) return "";
  const { examples, labelled } = counts.data;
  const model = fileName(run?.model ?? models?.[0]?.model);
  return `${many(labelled, "labelled token")} in ${many(examples, "example")}${run?.dataset ? ` of ${fileName(run.dataset)}` : ""}${model ? `, scored by ${model}` : ""}${scored ? `. ${scored}` : ""}`;
}

const shown = () => VIEWS.filter((view) => view.has(folder));

function update() {
  hideTip();
  const views = shown();
  const view = views.find(({ name }) => name === state.view) ?? views[0];
  drawTabs(views, view);
  drawTools();
  place("filters").hidden = !updateFilters || view === runs || view === checks;
  updateFilters?.();
  for (const [other, { root }] of mounted) root.hidden = other !== view;
  if (!mounted.has(view)) {
    const root = h("div", { id: `view-${view.name}`, role: "tabpanel", "aria-labelledby": `tab-${view.name}` });
    place("main").append(root);
    mounted.set(view, { root, update: view.mount(root, folder) });
  }
  mounted.get(view).update();
}

function drawTabs(views, chosen) {
  const tab = (view, index) =>
    h(
      "button",
      {
        role: "tab",
        id: `tab-${view.name}`,
        "data-key": `tab ${view.name}`,
        "aria-selected": `${view === chosen}`,
        "aria-controls": `view-${view.name}`,
        tabindex: view === chosen ? 0 : -1,
        title: `key ${index + 1}`,
        onclick: () => change({ view: view.name }),
      },
      view.title,
      view.badge?.(folder) ? [" ", h("span", { class: "badge" }, `${view.badge(folder)}`)] : null,
    );
  fill(place("tabs"), ...views.map(tab));
  const keys = [...(HINTS[chosen.name] ?? []), ["/", "search"], ["?", "all keys"]];
  fill(place("keys"), ...keys.map(([key, what]) => h("span", {}, h("kbd", {}, key), ` ${what}`)));
  place(`tab-${chosen.name}`).scrollIntoView({ block: "nearest", inline: "nearest" });
}
place("tabs").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const tabs = [...place("tabs").children];
  const next = tabs.at((tabs.indexOf(document.activeElement) + step) % tabs.length);
  next.focus();
  next.click();
});

function drawTools() {
  const open = place("tools").querySelector("details")?.open;
  const export_ = folder && folder.kind !== "runs" && exporting();
  if (export_) export_.open = open;
  fill(
    place("tools"),
    export_,
    choice(
      "Theme",
      [
        ["", "auto"],
        ["light", "light"],
        ["dark", "dark"],
      ],
      theme.chosen(),
      theme.set,
    ),
    h("button", { "aria-label": "Help", "data-key": "help", onclick: () => place("help").showModal() }, "?"),
  );
}

// Downloads of the selection, and the command that trains without these examples
function exporting() {
  const copied = h("span", { class: "quiet", role: "status" });
  const copy = async () => {
    await navigator.clipboard.writeText(folder.train).then(
      () => (copied.textContent = "copied"),
      () => (copied.textContent = "select it and copy"),
    );
  };
  const file = (name, what) =>
    h(
      "a",
      { class: "button", href: url(`export/${name}`, selection()), download: name, "data-key": name },
      name,
      h("span", { class: "quiet" }, ` ${what}`),
    );
  return h(
    "details",
    { class: "menu right" },
    h("summary", { "data-key": "export" }, "Export"),
    h(
      "div",
      { class: "pop" },
      h("p", {}, "The current selection, with filters and box:"),
      file("examples.jsonl", "the examples, one on each line"),
      file("tokens.csv", "the labelled tokens"),
      state.origin === "data"
        ? [
            h("p", {}, "To train without these examples, add your other training flags to:"),
            h("code", { class: "command" }, folder.train),
            h("div", { class: "row" }, h("button", { "data-key": "copy", onclick: copy }, "copy"), copied),
          ]
        : h("p", {}, "Training can leave out examples of the data only."),
    ),
  );
}

function drawHelp() {
  fill(
    place("help"),
    h("h2", {}, "What this page shows"),
    h(
      "p",
      {},
      `Each labelled token has two coordinates: the model's ${terms.entropy} (nats), from sure to unsure, and the probability of the label, from unlikely to likely. `,
      "If the model is sure and the label is unlikely, the token is a ",
      h("b", {}, "confident conflict"),
      ". Training on such tokens overwrites what the model knows. A gate gives them smaller weights.",
    ),
    h(
      "p",
      {},
      "p is the probability of the label, and nll = −ln p.",
      !folder.absent &&
        " The gradient is the norm of the loss's gradient by the logits, √(Σp² − 2p + 1), times the gate's weight.",
    ),
    h("h2", {}, "Keys"),
    h(
      "dl",
      {},
      KEYS.flatMap(([key, what]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, what)]),
    ),
    h("button", { onclick: () => place("help").close() }, "Close"),
  );
}

addEventListener("keydown", (event) => {
  if (!folder || event.ctrlKey || event.metaKey || event.altKey || place("help").open) return;
  const typing = event.target.matches("input:not([type=range]), select, textarea");
  if (event.key === "Escape") {
    const menu = event.target.closest("details[open]");
    if (menu) return void ((menu.open = false), menu.querySelector("summary").focus());
    if (typing) return event.target.blur();
  }
  if (typing) return;
  const views = shown();
  const view = views.find(({ name }) => name === state.view) ?? views[0];
  const act = mounted.get(view)?.update.keys?.[event.key];
  if (act) act();
  else if (views[Number(event.key) - 1]) change({ view: views[Number(event.key) - 1].name });
  else if (event.key === "?") place("help").showModal();
  else if (event.key === "/") (mounted.get(view)?.root.querySelector("[type=search]") ?? place("search"))?.focus();
  else if (event.key === "t") theme.set({ "": "dark", dark: "light", light: "" }[theme.chosen()]);
  else if (event.key === "Escape" && state.box) change({ box: "" });
  else return;
  event.preventDefault();
});
addEventListener("click", (event) => {
  for (const menu of document.querySelectorAll("details.menu[open]"))
    if (!menu.contains(event.target)) menu.open = false;
});

start();

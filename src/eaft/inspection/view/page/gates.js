// What a gate would do to this data: its weights, what it removes, and the gradients that remain.

import { url } from "./api.js";
import { colourScale, histogram, legend, plane, sumUp, watch } from "./charts.js";
import {
  announce,
  bar,
  count,
  eachFrame,
  fileName,
  fill,
  h,
  many,
  number,
  part,
  select,
  share,
  table,
  token,
} from "./dom.js";
import { change, currentBox, everything, isEverything, isFiltered, selection, setBox, state } from "./state.js";

const MUTED = 20; // tokens that are listed

export default {
  name: "gates",
  title: "Gates",
  has: (folder) => folder.kind !== "runs",
  mount(root, folder) {
    const chooser = h("div", {}),
      effects = h("div", {}),
      pictures = h("div", {}),
      sources = h("section", { "aria-label": "By source" }),
      every = h("section", { "aria-label": "Every gate" }),
      muted = h("section", { "aria-label": "Muted tokens" });
    root.append(
      h(
        "div",
        { class: "beside" },
        h("section", { class: "narrow", "aria-label": "Gate" }, chooser, effects),
        h("section", { class: "wide", "aria-label": "Gradients" }, pictures),
      ),
      h(
        "div",
        { class: "halves" },
        h("div", {}, sources, every),
        muted,
      ),
    );
    let shownGate;
    const effect = part(effects, drawEffect);
    let figures = [];
    const picture = part(pictures, (landscape, weighted) => {
      if (!weighted.gradient) return [h("p", { class: "quiet" }, "Gradients need the whole vocabulary, which this run does not have.")];
      const { drawn, scale } = drawPlanes(width(), landscape, weighted);
      figures = drawn;
      return [h("div", { class: "planes" }, drawn), h("div", { class: "under" }, legend(scale))];
    });
    const width = watch(pictures, () => picture.redraw());
    const bySource = part(sources, ({ by_source }) => drawSources(by_source));
    const tokens = part(muted, (answer) => drawMuted(answer.muted));

    return function update() {
      const gate = folder.gates.find(({ name }) => name === state.gate) ?? folder.gates[0];
      if (shownGate !== gate.name + JSON.stringify(state.params)) {
        const typing = chooser.contains(document.activeElement) && shownGate?.startsWith(gate.name + "{");
        if (!typing) fill(chooser, ...choose(folder, gate));
        shownGate = gate.name + JSON.stringify(state.params);
      }
      const of = { gate: gate.name, params: JSON.stringify(state.params) };
      const answer = url("gates", selection(of));
      effect.ask(answer);
      bySource.ask(answer);
      tokens.ask(answer);
      fill(every, ...everyGate(folder));
      // The planes show the tokens outside of the box too
      picture.ask(
        url("landscape", selection({ without: ["box"] })),
        url("gates", selection({ without: ["box"], ...of })),
      );
      figures.forEach((figure) => figure.moveBox(currentBox()));
    };
  },
};

// The gate, what it means, and a slider for each of its parameters
function choose(folder, gate) {
  const names = folder.gates.map(({ name }) => [name, name]);
  return [
    h(
      "label",
      { class: "labelled" },
      h("span", {}, "gate"),
      select("Gate", names, gate.name, (name) => change({ gate: name, params: {} })),
    ),
    h("p", { class: "quiet" }, gate.help),
    ...gate.params.map((param) => field(param)),
    Object.keys(state.params).length > 0 &&
      h(
        "button",
        {
          class: "plain",
          onclick: (event) => {
            event.target.blur();
            change({ params: {} });
          },
        },
        "defaults",
      ),
  ];
}

function field({ name, default: usual, min, max, step, choices }) {
  const value = state.params[name] ?? usual;
  const set = (next, onTheWay) => change({ params: { ...state.params, [name]: next } }, { onTheWay });
  const title = name.replace(/_/g, " ");
  if (choices?.length)
    return h(
      "label",
      { class: "slider" },
      h("span", {}, title),
      select(
        title,
        choices.map((item) => [item, item]),
        value,
        (next) => set(next),
      ),
    );
  const typed = h("input", {
    type: "number",
    min,
    max,
    step: "any",
    value: Number(Number(value).toPrecision(4)),
    "aria-label": `${title}, as a number`,
    onchange: () => {
      slider.value = typed.value;
      set(Number(typed.value));
    },
  });
  const slide = eachFrame((onTheWay) => set(Number(slider.value), onTheWay));
  const slider = h("input", {
    type: "range",
    min,
    max,
    step,
    value,
    "aria-label": title,
    "data-key": `slider ${name}`,
    oninput: () => {
      typed.value = slider.value;
      slide(true);
    },
    onchange: () => slide(false),
  });
  slider.value = value;
  return h("label", { class: "slider" }, h("span", {}, title), slider, typed);
}

// The tokens that the numbers of this view are of
const tokensOf = (number) =>
  state.box ? `the ${many(number, "token")} in the box` : isFiltered() ? `the ${many(number, "token")} shown` : `all ${many(number, "token")}`;
const where = () => (state.box ? " in the box" : "");

function drawEffect({ removed: { tokens, nll, gradient }, mean_weight, weights, count: tokenCount, sampled }) {
  announce(
    `The gate removes ${share(tokens)} of the weight, ${share(nll)} of the nll${gradient === null ? "" : `, ${share(gradient)} of the gradient`}`,
  );
  const row = (name, value) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, bar(value, "hot")));
  return [
    h("h2", {}, `From ${tokensOf(tokenCount)} it removes`),
    h(
      "table",
      { class: "removed", "aria-label": "What the gate removes" },
      h("tbody", {}, row("weight", tokens), row("nll", nll), gradient !== null && row("gradient", gradient)),
    ),
    h(
      "p",
      { class: "quiet note" },
      `Mean weight ${number(mean_weight, 3)}. What it removes: the share of the sum that its weights take away; below 0 they add.`,
      sampled && ` Computed on a sample of ${count(sampled)} tokens.`,
    ),
    histogram(weights, 340, "weight of a token"),
  ];
}

function drawPlanes(width, landscape, weighted) {
  const size = width > 640 ? Math.floor((width - 16) / 2) : width;
  const pair = [landscape.gradient, weighted.gradient];
  const scale = colourScale(pair, {
    decades: 3,
    label: "sum over the bin's tokens of  w · √(Σp² − 2p + 1),  the norm of the loss's gradient by the logits",
  });
  const { corner, total } = landscape;
  const titles = [
    "SFT: w = 1",
    `${state.gate}${Object.entries(state.params)
      .map(([name, value]) => `, ${name.replace(/_/g, " ")} ${value}`)
      .join("")}`,
  ];
  const drawn = pair.map((values, index) =>
    plane({
      answer: landscape,
      values,
      scale,
      width: size,
      box: currentBox(),
      onbox: setBox,
      title: titles[index],
      corner: `${share((index ? cornerOf(landscape, values) : corner.gradient) / (d3.sum(values.flat()) || 1))} of the gradient`,
      describe: (i, j) =>
        `gradient ${number(values[i][j], 1)}, of ${number(landscape.gradient[i][j], 1)} without the gate; ${sumUp(landscape.tokens[i][j], landscape.nll[i][j], total)}`,
    }),
  );
  return { drawn, scale };
}

// The sum of a matrix over the confident conflicts, whose borders are edges of bins
function cornerOf({ entropy_edges: H, prob_edges: P }, values) {
  return d3.sum(
    values.filter((_, i) => H[i + 1] <= 0.5 + 1e-9).map((row) => d3.sum(row.filter((_, j) => P[j + 1] <= 0.1 + 1e-9))),
  );
}

// Columns of what is removed; a run of vLLM has no gradients
const removed = (rows) =>
  ["tokens", "nll", "gradient"]
    .filter((name) => name !== "gradient" || rows.some((row) => row.gradient !== null))
    .map((name) => ({ title: name === "tokens" ? "weight" : name, numeric: true, cell: (row) => bar(row[name], "hot") }));

function drawSources(rows) {
  return [
    h("h2", {}, `Removed by source${where()}`),
    table(
      "By source",
      [
        { title: "source", class: "long-name", cell: (row) => fileName(row.source) },
        ...removed(rows),
      ],
      rows,
    ),
  ];
}

function drawMuted(rows) {
  return [
    h("h2", {}, `Tokens${where()} that it mutes most`),
    table(
      "Muted tokens",
      [
        {
          title: "token",
          cell: (row) =>
            h(
              "button",
              { class: "plain", onclick: () => change({ view: "tokens", group: "", token: `${row.token_id}` }) },
              token(row.text),
            ),
        },
        { title: "muted", numeric: true, cell: (row) => count(row.count), help: "how many have a weight below 0.5" },
        { title: "nll removed", numeric: true, cell: (row) => number(row.nll_removed, 1) },
      ],
      rows.slice(0, MUTED),
    ),
  ];
}

// Every gate on all of the data under the base model, as `eaft inspect` measured it
function everyGate({ summary }) {
  const gates = (summary?.gates ?? []).filter(({ source }) => source === null || source === undefined);
  if (!gates.length) return [];
  const title = h("h2", {}, "Every gate on all of the data, under the base model");
  if (!isEverything())
    return [
      title,
      h("p", { class: "quiet" }, "The numbers above are of other tokens."),
      h("button", { "data-key": "everything", onclick: () => change(everything()) }, "Show all of the data"),
    ];
  return [
    title,
    table(
      "Every gate",
      [
        {
          title: "gate",
          cell: (row) => [
            h(
              "button",
              {
                class: "plain",
                onclick: () => {
                  change({ gate: row.gate, params: {} });
                  scrollTo(0, 0);
                },
              },
              row.gate,
            ),
            h("span", { class: "quiet settings" }, settings(row)),
          ],
        },
        ...removed(gates),
      ],
      gates,
    ),
  ];
}

function settings({ params, note }) {
  const short = (value) => (typeof value === "number" ? Number(value.toPrecision(3)) : value);
  const all = Object.entries(params ?? {}).map(([name, value]) => `${name.replace(/_/g, " ")} ${short(value)}`);
  return [all.join(", "), note].filter(Boolean).join(". ");
}

// The filter bar: model, origin, sources, ranges and search, and the active filters as chips.

import { get, url } from "./api.js";
import { fileName, fill, h, later, select, choice, visible } from "./dom.js";
import { change, isFiltered, noFilters, range, state } from "./state.js";

const names = new Map(); // texts of the tokens in filters

export function mountFilters(element, folder) {
  const choices = h("div", { class: "row" });
  const chips = h("div", { class: "chips", role: "group", "aria-label": "Active filters" });
  const search = h("input", {
    type: "search",
    id: "search",
    placeholder: "search the text",
    "aria-label": "Search the text of the examples",
    oninput: later((event) => change({ search: event.target.value }), 250),
  });
  const fields = {
    nll: rangeFields("nll of the example", "nll", "nats", 1),
    conflict: rangeFields("conflict share of the example", "conflict", "%", 100),
  };
  const sources = h("select", {
    "aria-label": "Add a source",
    onchange: (event) => change({ source: [...state.source, event.target.value] }),
  });
  const more = h(
    "details",
    { class: "menu" },
    h("summary", {}, "Filter"),
    h(
      "div",
      { class: "pop" },
      fields.nll.element,
      fields.conflict.element,
      folder.sources.length > 1 && h("label", { class: "labelled" }, h("span", {}, "source"), sources),
    ),
  );
  // An input keeps its place while the user types
  element.append(h("div", { class: "row" }, choices, more, search), chips);

  return function update() {
    const models = folder.models.map(({ name, step }) => [
      name,
      step === null || step === undefined ? name : `${name} (step ${step})`,
    ]);
    fill(
      choices,
      models.length > 1 &&
        h(
          "label",
          { class: "inline" },
          "scored by ",
          select("Scored by", models, state.model, (model) => change({ model })),
        ),
      folder.origins.length > 1 &&
        choice(
          "Origin",
          folder.origins.map((name) => [name, name]),
          state.origin,
          (origin) => change({ origin }),
        ),
    );
    if (state.token && !names.has(state.token)) name(state.token, update);
    if (document.activeElement !== search) search.value = state.search;
    fields.nll.update();
    fields.conflict.update();
    const left = folder.sources.filter((name) => !state.source.includes(name));
    sources.replaceChildren(
      h("option", { value: "" }, "any"),
      ...left.map((name) => h("option", { value: name }, fileName(name))),
    );
    sources.value = "";
    fill(
      chips,
      ...active().map(([text, patch]) => chip(text, patch)),
      isFiltered() &&
        h("button", { class: "plain", "data-key": "clear", onclick: () => change(noFilters()) }, "clear all"),
    );
  };
}

// Asks for a token's text at a place where it is a label
async function name(id, then) {
  names.set(id, `#${id}`);
  const { rows } = await get(url("tokens", { origin: state.origin, token: id, limit: 1 })).catch(() => ({ rows: [] }));
  if (rows.length) names.set(id, rows[0].text);
  then();
}

const chip = (text, patch) =>
  h(
    "button",
    { class: "chip", "aria-label": `Remove the filter: ${text}`, onclick: () => change(patch) },
    h("bdi", {}, text),
    " ×",
  );

function active() {
  const between = (text, unit, scale = 1) => {
    const [low, high] = range(text).map((value) => (value === null ? null : Number((value * scale).toPrecision(4))));
    return low === null ? `≤ ${high}${unit}` : high === null ? `≥ ${low}${unit}` : `${low}–${high}${unit}`;
  };
  const [h0, h1, p0, p1] = state.box.split(",");
  return [
    ...state.source.map((name) => [
      `source ${fileName(name)}`,
      { source: state.source.filter((other) => other !== name) },
    ]),
    state.nll && [`nll ${between(state.nll, " nats")}`, { nll: "" }],
    state.conflict && [`conflict share ${between(state.conflict, "%", 100)}`, { conflict: "" }],
    state.search && [`“${state.search}”`, { search: "" }],
    state.box && [`entropy ${h0}–${h1}, probability ${p0}–${p1}`, { box: "" }],
    state.token && [`token ${visible(names.get(state.token) ?? "…")}`, { token: "" }],
  ].filter(Boolean);
}

function rangeFields(label, name, unit, scale) {
  const field = (side) =>
    h("input", {
      type: "number",
      step: "any",
      min: 0,
      "aria-label": `${label}, ${side}`,
      placeholder: side,
      onchange: set,
    });
  const [low, high] = [field("from"), field("to")];
  function set() {
    const [from, to] = [low, high].map((input) => (input.value === "" ? "" : Number(input.value) / scale));
    change({ [name]: from === "" && to === "" ? "" : `${from},${to}` });
  }
  function update() {
    const values = state[name] ? range(state[name]) : [null, null];
    [low, high].forEach((input, index) => {
      if (document.activeElement !== input)
        input.value = values[index] === null ? "" : Number((values[index] * scale).toPrecision(6));
    });
  }
  const element = h("fieldset", {}, h("legend", {}, label), low, " – ", high, ` ${unit}`);
  return { element, update };
}

// The state of the page, kept in the address's fragment: a link shows the same view, and back and forward work.

const DEFAULTS = {
  view: "",
  // The selection, which every answer is about
  model: "base",
  origin: "data",
  source: [],
  nll: "", // "LO,HI", either may be empty
  conflict: "",
  search: "",
  box: "", // "H0,H1,P0,P1"
  token: "", // id
  // Landscape
  colour: "tokens",
  beside: "", // "origin:rollouts" or "model:tuned"
  as: "side",
  // Gates
  gate: "eaft",
  params: {},
  // Examples
  sort: "conflict_nll_share",
  order: "desc",
  page: 1,
  example: "",
  at: "", // the position of a token in the example
  paint: "prob",
  raw: "", // "open": shows the row as it was
  // Tokens
  group: "conflict",
  // Runs
  run: "",
  metric: "",
  of: "0", // which of the run's models
  list: "", // of items
  task: "",
  find: "", // a text in the items
  item: "", // the number of the item that is open
  point: "", // "STEP,SHARE" of the front of `eaft tune`
};
const FILTERS = ["source", "nll", "conflict", "search", "box", "token"];
const SELECTION = ["model", "origin", ...FILTERS];

export let state = read();
export let passing = false; // whether the last change is part of a drag
const listeners = [];
let writing;

function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  const values = structuredClone(DEFAULTS);
  for (const [name, value] of Object.entries(DEFAULTS)) {
    if (!given.has(name)) continue;
    if (Array.isArray(value)) values[name] = given.getAll(name);
    else if (typeof value === "object") values[name] = parse(given.get(name)) ?? value;
    else values[name] = typeof value === "number" ? Number(given.get(name)) || value : given.get(name);
  }
  return values;
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null; // the link is incomplete
  }
}

function address() {
  const given = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (JSON.stringify(value) === JSON.stringify(DEFAULTS[name])) continue;
    if (Array.isArray(value)) value.forEach((item) => given.append(name, item));
    else given.set(name, typeof value === "object" ? JSON.stringify(value) : value);
  }
  return `#${given}`;
}

// Changes the state. A change during a drag makes no step in the browser's history
export function change(patch, { onTheWay = false } = {}) {
  passing = onTheWay;
  const other = ["view", "group", "run", "of", "list", "task", "find", ...SELECTION].some((name) => name in patch);
  state = { ...state, ...(other ? { page: 1 } : {}), ...patch };
  clearTimeout(writing);
  const same = address() === (location.hash || "#");
  if (passing)
    writing = setTimeout(() => history.replaceState(null, "", address()), 200); // browsers limit how often this may be called
  else if (!same) history.pushState(null, "", address());
  listeners.forEach((listener) => listener());
}

export function subscribe(listener) {
  listeners.push(listener);
}

function follow() {
  clearTimeout(writing);
  if (address() === (location.hash || "#")) return;
  state = read();
  passing = false;
  listeners.forEach((listener) => listener());
}
addEventListener("popstate", follow);
addEventListener("hashchange", follow);

// The parameters of a request: the selection without the names in `without`
export function selection({ without = [], ...other } = {}) {
  const chosen = SELECTION.filter((name) => !without.includes(name)).map((name) => [name, state[name]]);
  return { ...Object.fromEntries(chosen), ...other };
}

export const noFilters = () => Object.fromEntries(FILTERS.map((name) => [name, DEFAULTS[name]]));
// The whole of the data under the base model, which summary.json is about
export const everything = () => ({ ...noFilters(), model: DEFAULTS.model, origin: DEFAULTS.origin });
export const isEverything = () => !isFiltered() && state.model === DEFAULTS.model && state.origin === DEFAULTS.origin;
export const currentBox = () => (state.box ? state.box.split(",").map(Number) : null);
export const setBox = (box, onTheWay) => change({ box: box ? box.join(",") : "" }, { onTheWay });
export const isFiltered = () => FILTERS.some((name) => state[name].length > 0);
export const range = (text) => text.split(",").map((part) => (part === "" ? null : Number(part)));

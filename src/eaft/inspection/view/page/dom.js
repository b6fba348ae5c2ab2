// Elements, text and numbers. Text from the data only ever becomes text nodes.

import { get } from "./api.js";
import { passing } from "./state.js";

// An element: h("a", { href, class, onclick, "aria-label": ... }, "text", child, [children], null)
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const count = d3.format(",d");
export const many = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
export const short = (value) => d3.format(Math.abs(value) < 1000 ? ".3~r" : ".3~s")(value);
export const number = (value, digits = 2) => (Number.isFinite(value) ? value.toFixed(digits) : "–");

export function share(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size > 0 && size < 0.001) return `${value < 0 ? "−" : ""}<0.1%`;
  return d3.format(size < 0.1 ? ".1%" : ".0%")(value);
}

// Text on one line, and a token's text, with symbols for invisible characters
// Names that depend on the folder: a run of vLLM has only the entropy of the likeliest tokens
export const terms = { entropy: "entropy" };

export const oneLine = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍");
const UNSEEN = /[\p{Cc}\p{Zl}\p{Zp}\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]/gu;
export const visible = (text) =>
  oneLine(text)
    .replace(/^ | $/g, "␣")
    .replace(UNSEEN, (c) => `<U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}>`);
export const token = (text) => h("bdi", { class: "token" }, visible(text));

// Our own prose with **bold** and `code`
export const prose = (text) =>
  text
    .split(/(\*\*.*?\*\*|`.*?`)/s)
    .map((piece) =>
      piece.startsWith("**")
        ? h("strong", {}, piece.slice(2, -2))
        : piece.length > 1 && piece.startsWith("`")
          ? token(piece.slice(1, -1))
          : piece,
    );

// What the model wanted instead of a token, with counts
export const wanted = (list, most = 5) =>
  h(
    "span",
    { class: "wanted" },
    list
      .slice(0, most)
      .map((item) => h("span", {}, token(item.text), h("span", { class: "quiet" }, ` ${count(item.count)} `))),
  );

// The first words of examples, without a beginning that all of them share, as a template's
export function snippets(rows) {
  const texts = rows.map(({ snippet }) => snippet);
  const [first, last] = [d3.min(texts) ?? "", d3.max(texts) ?? ""];
  let same = 0;
  while (same < first.length && first[same] === last[same]) same += 1;
  const cut = texts.length > 1 && same > 10 ? first.slice(0, same).search(/\S*$/) : 0; // from a word's beginning
  return texts.map((text) => h("span", { class: "snippet", dir: "auto" }, cut ? `…${text.slice(cut)}` : text));
}

// The last part of a file's path; a Hub id is not changed
export const fileName = (path) => (path?.startsWith("/") ? path.split("/").at(-1) : path);

export const announce = (text) => (document.getElementById("live").textContent = text);

// A choice among a few options: buttons, one of them pressed
export function choice(label, options, chosen, choose) {
  const button = ([value, text]) =>
    h(
      "button",
      { "aria-pressed": `${value === chosen}`, "data-key": `${label} ${value}`, onclick: () => choose(value) },
      text,
    );
  return h("span", { class: "choice", role: "group", "aria-label": label }, options.map(button));
}

export function select(label, options, chosen, choose, attributes = {}) {
  const element = h(
    "select",
    { "aria-label": label, "data-key": label, ...attributes, onchange: (event) => choose(event.target.value) },
    options.map(([value, text]) => h("option", { value }, text)),
  );
  element.value = chosen;
  return element;
}

export const labelled = (text, control) => h("label", { class: "labelled" }, h("span", {}, text), control);

// A table: columns are { title, numeric, cell(row), sort, class }
export function table(label, columns, rows, { onrow, sorted, empty = "Nothing here." } = {}) {
  const head = columns.map((column) => {
    const direction = sorted && column.sort === sorted.by ? sorted.order : null;
    const arrow = direction === "desc" ? " ↓" : direction === "asc" ? " ↑" : "";
    const title = column.sort
      ? h(
          "button",
          { "data-key": `sort ${column.sort}`, title: column.help, onclick: () => sorted.choose(column.sort) },
          column.title,
          arrow,
        )
      : h("span", { title: column.help }, column.title);
    const order = direction && (direction === "desc" ? "descending" : "ascending");
    return h("th", { scope: "col", class: css(column), "aria-sort": order }, title);
  });
  const body = rows.map((row, index) => {
    const cells = columns.map((column) => h("td", { class: css(column), "data-title": column.title }, column.cell(row, index)));
    return h("tr", onrow ? onrow(row) : {}, cells);
  });
  if (!rows.length) body.push(h("tr", {}, h("td", { colspan: columns.length, class: "quiet" }, empty)));
  const cards = columns.some((column) => column.class === "text-cell"); // on a narrow screen
  return h(
    "div",
    { class: "scroll" },
    h("table", { "aria-label": label, class: cards && "cards" }, h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)),
  );
}
const css = (column) => [column.numeric && "numeric", column.class].filter(Boolean).join(" ") || null;

// A share as a bar behind its number
export function bar(value, tone = "") {
  // A gate that adds has no bar: beside it the bars of the others would look short
  if (value < 0) return h("span", { class: "bar" }, `adds ${share(-value)}`);
  const width = `${Math.min(Math.abs(value ?? 0), 1) * 100}%`;
  return h("span", { class: `bar ${tone}`, "--width": width }, share(value));
}

// Replaces an element's content; the focus stays on the control that had it
export function fill(element, ...children) {
  const key = element.contains(document.activeElement) && document.activeElement.dataset.key;
  element.replaceChildren(...children.flat().filter(Boolean));
  if (key) element.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
}

/*
A part of a view that shows answers. It requests them when the addresses change and draws them; it shows an error with
a button to try again. A newer request aborts an older one. During a drag the next request waits for the answer, so that
the server is not flooded.
*/
export function part(element, draw) {
  let wanted, controller, shown, next;
  function redraw() {
    if (shown) fill(element, draw(...shown));
  }
  async function ask(...addresses) {
    const now = addresses.join(" ");
    const busy = element.getAttribute("aria-busy") === "true";
    next = passing && busy && now !== wanted ? addresses : null;
    if (now === wanted || next) return;
    wanted = now;
    controller?.abort();
    controller = new AbortController();
    element.setAttribute("aria-busy", "true");
    try {
      const received = await Promise.all(addresses.map((address) => get(address, controller.signal)));
      if (now !== wanted) return;
      shown = received;
      redraw();
    } catch (error) {
      if (now !== wanted) return;
      wanted = shown = undefined;
      const retry = h("button", { onclick: () => ask(...addresses) }, "Try again");
      fill(element, h("p", { class: "error", role: "alert" }, error.message, " ", retry));
      if (error instanceof TypeError) console.error(error); // a fault of this page
    }
    element.setAttribute("aria-busy", "false");
    if (next) ask(...next);
  }
  // Shows nodes without a request
  function show(nodes) {
    controller?.abort();
    wanted = shown = undefined;
    element.setAttribute("aria-busy", "false");
    fill(element, ...nodes);
  }
  return { ask, redraw, show };
}

// Calls at most once in each frame, with the last arguments
export function eachFrame(call) {
  let last, waiting;
  return (...args) => {
    last = args;
    waiting ??= requestAnimationFrame(() => {
      waiting = undefined;
      call(...last);
    });
  };
}

export function later(call, milliseconds = 200) {
  let timer;
  return (...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...args), milliseconds);
  };
}

// An example as text: labelled tokens are coloured by the model's statistics, unlabelled tokens are grey.

import { h, number, share, terms, token } from "./dom.js";
import { hideTip, showTip } from "./tip.js";

const LARGEST = { entropy: 4, change: 3 }; // nats with the full colour

// The colourings of the text: the name, what the two ends of the colours mean, and the strength in [-1, 1]
export const PAINTS = {
  prob: { title: "probability", ends: ["likely", "unlikely"], strength: (t) => 1 - t.prob },
  entropy: {
    title: "entropy",
    ends: ["sure", `unsure (${LARGEST.entropy} nats)`],
    strength: (t) => Math.min(t.entropy / LARGEST.entropy, 1),
  },
  weight: { title: "weight", ends: ["muted: 0", "1"], strength: (t) => Math.min(t.weight ?? 0, 1) },
  change: {
    title: "change",
    ends: [`less likely than under base (${LARGEST.change} nats)`, "more likely"],
    strength: (t) => Math.max(-1, Math.min((t.log_prob - t.base_log_prob) / LARGEST.change, 1)),
  },
};

const graphemes = new Intl.Segmenter(undefined, { granularity: "grapheme" });

// Tokens in groups of whole characters as a reader sees them: an emoji of three tokens is one group
export function groups(tokens) {
  const text = tokens.map(({ text }) => text).join("");
  const ends = new Set([...graphemes.segment(text)].map(({ index, segment }) => index + segment.length));
  const closedGroups = [];
  let group = [],
    end = 0;
  for (const item of tokens) {
    const before = end;
    end += item.text.length;
    // A token inside a character has no text; the character belongs to its last token
    const closed = end > before && (ends.has(end) || item.text.endsWith("\n"));
    group.push(item);
    if (closed) {
      closedGroups.push(group);
      group = [];
    }
  }
  if (group.length) closedGroups.push(group);
  return closedGroups;
}

// The element of the text; `at` is the position of the token with the focus
export function example({ tokens }, paint, at) {
  const shown = h("div", {
    class: `text paint-${paint}`,
    dir: "auto",
    role: "group",
    "aria-label": "The example's text. Arrow keys go from token to token.",
  });
  const parts = new Map();
  let grey = "";
  const endGrey = () => {
    if (grey) shown.append(h("span", { class: "unlabelled" }, lines(grey)));
    grey = "";
  };
  for (const group of groups(tokens)) {
    const marked = group.filter((item) => item.labelled && item.log_prob !== null);
    const text = group.map((item) => item.text).join("");
    if (!marked.length) {
      grey += text;
      continue;
    }
    endGrey();
    const strengths = marked.map(PAINTS[paint].strength);
    const strongest = strengths[d3.maxIndex(strengths, Math.abs)] || 0;
    const part = h(
      "span",
      {
        class: ["labelled", marked.some((item) => item.conflict) && "conflict", strongest < 0 && "less"]
          .filter(Boolean)
          .join(" "),
        tabindex: -1,
        "data-at": group[0].position,
        "--strength": Math.abs(strongest).toFixed(3),
      },
      lines(text || "\ufffd"),
    );
    parts.set(part, group);
    shown.append(part);
  }
  endGrey();
  listen(shown, parts, at);
  return shown;
}

// Text with symbols for its line ends
function lines(text) {
  const pieces = text.split("\n");
  return pieces
    .flatMap((piece, index) => (index < pieces.length - 1 ? [piece, h("span", { class: "newline" }, "\n")] : [piece]))
    .filter((piece) => piece !== "");
}

function listen(shown, parts, at) {
  const all = [...parts.keys()];
  const partOf = (event) => event.target.closest?.("[data-at]");
  const show = (part) =>
    showTip(parts.get(part).flatMap(describe), part.getClientRects()[0] ?? part.getBoundingClientRect());
  shown.addEventListener("mouseover", (event) => (partOf(event) ? show(partOf(event)) : hideTip()));
  shown.addEventListener("mouseleave", hideTip);
  shown.addEventListener("click", (event) => partOf(event)?.focus());
  shown.addEventListener("focusin", (event) => {
    if (entry) entry.tabIndex = -1;
    entry = event.target;
    entry.tabIndex = 0;
    event.target.setAttribute("aria-describedby", "tip");
    requestAnimationFrame(() => show(event.target));
  });
  shown.addEventListener("focusout", hideTip);
  shown.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const conflict = event.key === "c" && !event.ctrlKey && !event.metaKey;
    if (!step && !conflict) return;
    const here = all.indexOf(event.target);
    const next = conflict ? all.slice(here + 1).find((part) => part.classList.contains("conflict")) : all[here + step];
    next?.focus();
    event.preventDefault();
  });
  const start = all.find((part) => parts.get(part).some(({ position }) => `${position}` === at)) ?? all[0];
  let entry = start; // the token that the tab key reaches
  if (entry) entry.tabIndex = 0;
  shown.focusToken = () => {
    start?.scrollIntoView({ block: "center" });
    start?.focus({ preventScroll: true });
  };
}

// The tooltip of a token
function describe(item) {
  const head = h(
    "p",
    {},
    token(item.token),
    h("span", { class: "quiet" }, ` token ${item.token_id}, position ${item.position}`),
  );
  if (!item.labelled || item.log_prob === null) return [head, h("p", { class: "quiet" }, "no label: not trained on")];
  const facts = [
    ["probability", share(item.prob)],
    [terms.entropy, `${number(item.entropy)} nats`],
    ["nll", `${number(item.nll)} nats`],
    ["rank", item.rank],
    item.weight !== null && item.weight !== undefined && ["gate's weight", number(item.weight, 3)],
    item.base_log_prob !== null &&
      item.base_log_prob !== undefined && [
        "log-prob less base's",
        d3.format("+.2f")(item.log_prob - item.base_log_prob),
      ],
  ].filter(Boolean);
  const expected =
    item.rank === 1
      ? ["as the model expected"]
      : ["the model expected ", token(item.first_text), ` (${share(item.first_prob)})`];
  return [
    head,
    h("p", { class: item.conflict ? "hot" : null }, expected, item.conflict && " · confident conflict"),
    h(
      "dl",
      {},
      facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, `${value}`)]),
    ),
  ];
}

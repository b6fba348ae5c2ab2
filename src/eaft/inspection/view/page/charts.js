// Drawings with Observable Plot: the plane of entropy and probability, histograms, and the colours of both themes.

import { eachFrame, h, many, number, share, short, terms } from "./dom.js";
import { hideTip, showTip } from "./tip.js";

const CONFLICT = { entropy: 0.5, prob: 0.1 }; // the borders of a confident conflict, as in eaft.objective.statistics
const ENTROPY_TICKS = [0, 0.1, 0.5, 1, 2, 3, 4, 6, 8, 10, 12];
const PROB_TICKS = [0, 0.01, 0.1, 0.25, 0.5, 0.75, 1];

const dark = matchMedia("(prefers-color-scheme: dark)");
export function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : dark.matches;
}
dark.addEventListener("change", () => dispatchEvent(new Event("theme")));

// Returns a function that gives the width to draw at. Calls `redraw` when the width or the theme has changed since
export function watch(element, redraw) {
  let drawn;
  const now = () => `${element.clientWidth} ${isDark()}`;
  const check = eachFrame(() => element.clientWidth && drawn && drawn !== now() && redraw());
  addEventListener("theme", check);
  new ResizeObserver(check).observe(element);
  return () => {
    drawn = now();
    return element.clientWidth || 300; // hidden: it is drawn again when it is shown
  };
}

export const STYLE = {
  background: "none",
  color: "var(--ink)",
  fontFamily: "inherit",
  fontSize: "11.5px",
  overflow: "visible",
};

// A plot that a screen reader takes for one picture; with a legend, the picture is inside a figure
export function plot(label, options) {
  const drawn = Plot.plot({ style: STYLE, ...options });
  const picture = drawn.matches("svg") ? drawn : drawn.querySelector(":scope > svg:last-of-type");
  picture.querySelectorAll("[aria-label]").forEach((mark) => mark.removeAttribute("aria-label"));
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", label);
  return drawn;
}

// Colours from few to many, and from less to more; the first or middle one is near the page's background
const few = {
  true: ["#1b2a41", "#1f5673", "#2a9d8f", "#9fd67b", "#fff3a3"],
  false: ["#e3eef4", "#a9d3de", "#4fa7bd", "#21638f", "#13224f"],
};
const less = { true: ["#58a6ff", "#21262d", "#ff8f66"], false: ["#1f6fd0", "#eceae6", "#c8431b"] };
const interpolate = (colours) => d3.piecewise(d3.interpolateLab, colours);

// The scale of colours for matrices of sums: logarithmic; `difference` has two directions from 0
export function colourScale(matrices, { difference = false, decades = 4, label, format = short }) {
  const values = matrices.flat(2).filter((value) => value !== 0);
  const largest = d3.max(values, Math.abs) ?? 1;
  const scale = difference
    ? {
        type: "diverging-symlog",
        constant: largest / 100,
        domain: [-largest, largest],
        interpolate: interpolate(less[isDark()]),
      }
    : {
        type: "log",
        domain: [d3.max([d3.min(values) ?? 1, largest / 10 ** decades]), largest],
        interpolate: interpolate(few[isDark()]),
        clamp: true,
      };
  if (scale.domain[0] === scale.domain[1]) scale.domain = [scale.domain[0] / 2, scale.domain[1]];
  return { ...scale, label, format };
}

export function legend({ format, label, ...scale }) {
  const [low, high] = scale.domain;
  const powers = d3.range(Math.ceil(Math.log10(low)), Math.log10(high)).map((power) => 10 ** power);
  const ticks = scale.type === "log" ? (powers.length > 1 ? powers : [low, high]) : [low, 0, high];
  const ramp = Plot.legend({
    color: scale,
    width: 260,
    height: 34,
    marginTop: 2,
    marginBottom: 18,
    marginLeft: 12,
    marginRight: 16,
    ticks,
    tickFormat: (v) => format(v),
    style: STYLE,
  });
  return h("div", { class: "legend" }, h("span", { class: "quiet" }, label), ramp);
}

/*
The plane: entropy upwards, the label's probability to the right, both at the square root (`eaft.inspection.landscape`).
`values` is a matrix as in `answer`, with a row for each bin of entropy. `describe(row, column)` returns a bin in words.
With `onbox`, the mouse, a finger or the arrow keys move a box; shift with an arrow key moves its far corner.
*/
export function plane({ answer, values, scale, title, corner, describe, width, box, onbox }) {
  const { entropy_edges: H, prob_edges: P } = answer;
  const height = Math.round(Math.min(Math.max(width * 0.72, 320), 520));
  const top = Math.sqrt(H.at(-1));
  const conflict = [{ x1: 0, x2: Math.sqrt(CONFLICT.prob), y1: 0, y2: Math.sqrt(CONFLICT.entropy) }];
  const axis = (ticks, domain) => ({
    domain,
    ticks: ticks.map(Math.sqrt).filter((tick) => tick <= domain[1]),
    tickFormat: (v) => `${Number((v * v).toPrecision(3))}`,
    labelArrow: "none",
  });
  const svg = plot(title, {
    width,
    height,
    marginLeft: 40,
    marginRight: 12,
    marginTop: 26,
    marginBottom: 40,
    x: { ...axis(PROB_TICKS, [0, 1]), label: "unlikely ←  probability of the label  → likely", labelAnchor: "center" },
    y: { ...axis(ENTROPY_TICKS, [0, top]), label: `↑ unsure: ${terms.entropy}, nats` },
    color: scale,
    marks: [
      Plot.frame({ stroke: "var(--line)" }),
      Plot.raster(
        values.flat().map((v) => v || NaN),
        {
          width: P.length - 1,
          height: H.length - 1,
          x1: 0,
          x2: 1,
          y1: 0,
          y2: top,
          imageRendering: "pixelated",
        },
      ),
      Plot.rect(conflict, {
        x1: "x1",
        x2: "x2",
        y1: "y1",
        y2: "y2",
        stroke: "var(--conflict)",
        strokeWidth: 1.75,
        fill: "none",
      }),
      Plot.text(conflict, {
        x: "x2",
        y: "y2",
        text: () => corner,
        textAnchor: "start",
        lineAnchor: "bottom",
        dx: 5,
        dy: -4,
        fill: "var(--conflict)",
        stroke: "var(--paper)",
        strokeWidth: 4,
        fontWeight: 600,
        fontSize: 12,
      }),
    ],
  });
  const x = squared(svg.scale("x")),
    y = squared(svg.scale("y"));
  const area = h("div", {}, svg);
  const figure = h("figure", { class: "plane" }, h("figcaption", {}, title), area);

  svg.addEventListener("pointermove", (event) => {
    const [px, py] = d3.pointer(event, svg);
    const prob = x.invert(px),
      entropy = y.invert(py);
    const inside = px >= x.range[0] && px <= x.range[1] && py <= y.range[0] && py >= y.range[1];
    const row = Math.min(d3.bisectRight(H, entropy) - 1, H.length - 2),
      column = Math.min(d3.bisectRight(P, prob) - 1, P.length - 2);
    if (!inside || event.buttons || row < 0 || column < 0) return hideTip();
    const place = `${terms.entropy} ${number(H[row])}–${number(H[row + 1])} nats, probability ${short(P[column])}–${short(P[column + 1])}`;
    showTip([h("p", {}, describe(row, column)), h("p", { class: "quiet" }, place)], {
      left: event.clientX,
      top: event.clientY,
    });
  });
  svg.addEventListener("pointerleave", hideTip);

  figure.moveBox = onbox && drag(area, svg, x, y, H, P, box, onbox);
  return figure;
}

// A scale of the value from Plot's linear scale of its root
const squared = ({ apply, invert, range }) => ({
  range,
  apply: (value) => apply(Math.sqrt(value)),
  invert: (pixels) => Math.max(0, invert(pixels)) ** 2,
});

// Lets the user draw a box by pointer and keys; returns a function that moves the box
function drag(area, svg, x, y, H, P, box, onbox) {
  const round = (value, largest) => (value >= largest * 0.999 ? largest : Math.max(0, Number(value.toPrecision(3))));
  const toBox = ([[x0, y0], [x1, y1]]) => [
    round(y.invert(y1), H.at(-1)),
    round(y.invert(y0), H.at(-1)),
    round(x.invert(x0), 1),
    round(x.invert(x1), 1),
  ];
  const brush = d3.brush().extent([
    [x.range[0], y.range[1]],
    [x.range[1], y.range[0]],
  ]);
  brush.on("brush end", ({ selection, sourceEvent, type }) => {
    if (sourceEvent) onbox(selection ? toBox(selection) : null, type === "brush");
  });
  const layer = d3.select(svg).append("g").attr("class", "brush").call(brush);
  let current = box;
  const moveBox = (now) => {
    current = now;
    const pixels = now && [
      [x.apply(now[2]), y.apply(now[1])],
      [x.apply(now[3]), y.apply(now[0])],
    ];
    layer.call(brush.move, pixels);
  };
  moveBox(box);

  area.tabIndex = 0;
  area.setAttribute("role", "application");
  area.setAttribute(
    "aria-label",
    "Entropy-probability plane. Arrow keys move the box by a bin, with shift its upper right corner; Escape removes it.",
  );
  area.dataset.key = "plane";
  area.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Escape" && current) onbox((current = null), false);
    else if (step)
      onbox(
        (current = current ? moved(current, step, event.shiftKey, H, P) : [0, CONFLICT.entropy, 0, CONFLICT.prob]),
        false,
      );
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  return moveBox;
}

// The box after a move by bins, of the whole box or of its upper right corner
function moved([h0, h1, p0, p1], [rows, columns], cornerOnly, H, P) {
  const nearest = (edges, value) => d3.leastIndex(edges, (a, b) => Math.abs(a - value) - Math.abs(b - value));
  const shift = (edges, low, high, by) => {
    let [from, to] = [nearest(edges, low), nearest(edges, high)];
    const last = edges.length - 1;
    if (cornerOnly) to = Math.max(from + 1, Math.min(to + by, last));
    else if (from + by >= 0 && to + by <= last) [from, to] = [from + by, to + by];
    return [edges[from], edges[to]].map((edge) => Number(edge.toPrecision(6)));
  };
  return [...shift(H, h0, h1, rows), ...shift(P, p0, p1, columns)];
}

export function histogram({ edges, counts }, width, label) {
  const bins = counts.map((tokens, index) => ({ x1: edges[index], x2: edges[index + 1], tokens }));
  return plot(label, {
    width,
    height: 150,
    marginLeft: 48,
    marginTop: 22,
    marginBottom: 34,
    x: { label, labelAnchor: "center", labelArrow: "none" },
    y: { label: "tokens", domain: [0, d3.max(counts) || 1], grid: true, ticks: 3, tickFormat: short, labelArrow: "none" },
    marks: [
      Plot.rectY(bins, {
        x1: "x1",
        x2: "x2",
        y: "tokens",
        fill: "var(--accent)",
        insetLeft: 0.5,
        insetRight: 0.5,
        title: (d) => `${number(d.x1)} to ${number(d.x2)}: ${many(d.tokens, "token")}`,
      }),
      Plot.ruleY([0], { stroke: "var(--line)" }),
    ],
  });
}

export const sumUp = (tokens, nll, all) =>
  `${many(tokens, "token")} (${share(tokens / all.tokens)}), ${share(nll / all.nll)} of the nll`;
export const palette = () =>
  isDark()
    ? ["#6cb6ff", "#ffa657", "#7ee787", "#d2a8ff", "#ff7b72", "#79c0c0"]
    : ["#2166ac", "#d95f02", "#1b7837", "#762a83", "#b2182b", "#01665e"];

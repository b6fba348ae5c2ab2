// The results of `eaft tune`: its sentence, the front with points to choose, the candidates' confirmation.

import { plot } from "./charts.js";
import { h, number, prose, share, table } from "./dom.js";
import { change, state } from "./state.js";

const keyOf = ({ step, share }) => `${step},${share}`;
const same = (first, second) => Boolean(first && second) && keyOf(first) === keyOf(second);
const signed = (value) => d3.format("+.3f")(value);
const nats = (value) => number(value, 4);
const quiet = (text) => h("span", { class: "quiet" }, ` ${text}`);
const nameOf = ({ step, share: part }) => (part === 1 ? `checkpoint of step ${step}` : `step ${step}, share ${number(part, 3)}`);

export function tuning({ results }, width) {
  const { screened, chosen, candidates, unconstrained } = results;
  const picked = screened.find((point) => keyOf(point) === state.point) ?? screened.find((point) => same(point, chosen));
  const point = picked ?? screened.find((other) => same(other, unconstrained)) ?? screened[0];
  const size = width > 900 ? width - 404 : width;
  return [
    h("p", { class: "lead" }, prose(results.sentence)),
    h(
      "div",
      { class: "front" },
      h(
        "figure",
        {},
        h(
          "figcaption",
          {},
          "Held-out nll against drift, on the screening data; click a point",
          candidates.some((candidate) => !same(candidate, chosen)) && quiet("cross: did not pass the confirmation"),
        ),
        front(results, point, size),
      ),
      point && details(results, point),
    ),
    h("h2", {}, "Confirmation of the candidates"),
    h(
      "p",
      { class: "quiet" },
      `${results.data.confirmation_rows} rows and ${results.data.confirmation_prompts} prompts that took no part in the choice. The first candidate that passes is returned. Bounds and intervals hold for all candidates together with 95%.`,
    ),
    confirmation(candidates, chosen),
    h("details", {}, h("summary", {}, `All ${screened.length} points of screening`), screening(results, point)),
  ];
}

// Lines: interpolations toward the base. Squares: checkpoints. A click or Enter chooses a point
function front({ screened, base_nll_screening: start, budget, candidates, chosen }, point, width) {
  const refused = screened.filter((one) => !same(one, chosen) && candidates.some((candidate) => same(candidate, one)));
  const steps = [...new Set(screened.map(({ step }) => step))].sort(d3.ascending);
  const base = steps.map((step) => ({ step, share: 0, drift: 0, nll: start }));
  const drawn = d3.sort([...base, ...screened], (one) => one.step, (one) => one.share);
  const ring = (data, stroke, r, strokeWidth) =>
    Plot.dot(data, { x: "drift", y: "nll", r, stroke, strokeWidth, fill: "none" });
  const colour = (_, index) => d3.interpolateViridis(0.2 + (0.65 * index) / Math.max(steps.length - 1, 1));
  const picture = plot("Held-out nll against drift", {
    width,
    height: Math.max(280, Math.min(420, width * 0.6)),
    marginLeft: 52,
    marginTop: 26,
    marginBottom: 40,
    inset: 10,
    grid: true,
    color: { domain: steps, type: "ordinal", range: steps.map(colour), legend: true, tickFormat: (step) => `step ${step}` },
    x: { label: "drift, nats per token →", labelAnchor: "center", labelArrow: "none" },
    y: { label: "↑ held-out nll, nats per token", labelArrow: "none" },
    marks: [
      budget.max_drift === null
        ? null
        : [
            Plot.ruleX([budget.max_drift], { stroke: "var(--conflict)", strokeDasharray: "5 4" }),
            Plot.text([`budget ${budget.max_drift}`], {
              x: () => budget.max_drift,
              frameAnchor: "top",
              // On the side that has room for it
              ...(budget.max_drift > d3.max(drawn, ({ drift }) => drift) / 2 ? { dx: -4, textAnchor: "end" } : { dx: 4, textAnchor: "start" }),
              fill: "var(--conflict)",
            }),
          ],
      Plot.line(drawn, { x: "drift", y: "nll", z: "step", stroke: "step", strokeOpacity: 0.7 }),
      ring(screened.filter((one) => same(one, chosen)), "var(--conflict)", 12, 2.5),
      ring([point].filter(Boolean), "var(--ink)", 8, 1.5),
      Plot.dot(base.slice(0, 1), { x: "drift", y: "nll", symbol: "times", stroke: "var(--ink)", r: 5 }),
      Plot.text(base.slice(0, 1), {
        x: "drift",
        y: "nll",
        text: () => "base",
        dx: 10,
        textAnchor: "start",
        fill: "var(--ink)",
      }),
      Plot.text(screened.filter((one) => same(one, chosen)), {
        x: "drift",
        y: "nll",
        text: () => "chosen",
        dx: 16,
        textAnchor: "start",
        fill: "var(--conflict)",
      }),
      Plot.dot(screened, {
        className: "points",
        x: "drift",
        y: "nll",
        fill: "step",
        symbol: (one) => (one.share === 1 ? "square" : "circle"),
        r: (one) => (one.share === 1 ? 6 : 4),
        stroke: "transparent",
        strokeWidth: 12,
      }),
      Plot.dot(refused, {
        x: "drift",
        y: "nll",
        symbol: "times",
        stroke: "var(--conflict)",
        strokeWidth: 2,
        r: 6,
        pointerEvents: "none",
      }),
    ],
    r: { type: "identity" },
    symbol: { type: "identity" },
  });
  picture.querySelectorAll(".points > *").forEach((mark) => {
    const one = screened[mark.__data__];
    const choose = () => change({ point: keyOf(one) });
    mark.setAttribute("role", "button");
    mark.setAttribute("tabindex", "0");
    mark.setAttribute("aria-label", `${nameOf(one)}: nll ${number(one.nll, 3)}, drift ${nats(one.drift)}`);
    mark.dataset.key = `point ${keyOf(one)}`;
    mark.addEventListener("click", choose);
    mark.addEventListener("keydown", (event) => event.key === "Enter" && choose());
  });
  picture.querySelectorAll("[role=img]").forEach((image) => image.setAttribute("role", "group"));
  return picture;
}

function details({ base_nll_screening: start, budget, candidates, chosen, data, model, unconstrained }, point) {
  const confirmed = candidates.find((candidate) => same(candidate, point));
  const within = budget.max_drift === null || point.drift <= budget.max_drift;
  const to = (low, high, show) => (Number.isFinite(low) ? quiet(`95%: ${show(low)} to ${show(high)}`) : null);
  const line = (title, ...value) => [h("dt", {}, title), h("dd", {}, ...value)];
  return h(
    "div",
    { class: "point", role: "region", "aria-label": "The chosen point" },
    h("h2", {}, nameOf(point)),
    h(
      "p",
      { class: "quiet" },
      [
        same(point, chosen) && "the returned model",
        same(point, unconstrained) && "the lowest held-out nll of all",
        point.share < 1 && `base + ${number(point.share, 3)} × (checkpoint − base)`,
      ]
        .filter(Boolean)
        .join(" · "),
    ),
    h("h3", {}, `Screening: ${data.screening_rows} rows, ${data.screening_prompts} prompts`),
    h(
      "dl",
      {},
      line("share", share(point.share)),
      line("held-out nll", number(point.nll, 3), quiet(`base ${number(start, 3)}`)),
      line(
        "minus the base",
        signed(point.nll_change ?? point.nll - start),
        to(point.nll_low, point.nll_high, signed),
      ),
      line("drift", nats(point.drift), to(point.drift_low, point.drift_high, nats)),
      budget.max_drift === null ? null : line("budget", within ? "within" : "over"),
    ),
    h("p", { class: "quiet" }, "Screening chooses, so its intervals are of this point alone and prove nothing."),
    h("h3", {}, "Confirmation"),
    confirmed
      ? h(
          "dl",
          {},
          line("held-out nll", number(confirmed.nll, 3)),
          line(
            "minus the base",
            signed(confirmed.nll_change),
            to(confirmed.nll_low, confirmed.nll_high, signed),
          ),
          line("drift", nats(confirmed.drift), quiet(`at most ${nats(confirmed.bound)}`)),
          line("budget", verdict(confirmed)),
          confirmed.tasks.flatMap((task) => line(task.task, lossOf(task))),
        )
      : h("p", { class: "quiet" }, "This point was no candidate, or another passed before it."),
    h("p", { class: "quiet" }, "base model: ", model),
  );
}

const lossOf = ({ drop, bound, items }) => [
  `${d3.format("+.1f")(-drop)} points`,
  quiet(`lost at most ${number(Math.max(bound, 0), 1)}, ${items} items`),
];
const verdict = ({ shown, within, prompts_needed: needed }) =>
  (shown ? "kept" : within ? "estimate within, not shown" : "over") + (needed ? `; ${needed} prompts would show it` : "");

function confirmation(candidates, chosen) {
  const numeric = (title, cell) => ({ title, numeric: true, cell });
  const tasks = [...new Set(candidates.flatMap((candidate) => candidate.tasks.map(({ task }) => task)))];
  return table(
    "Confirmation",
    [
      { title: "candidate", class: "long-name", cell: (one) => [nameOf(one), same(one, chosen) && h("b", {}, " returned")] },
      numeric("held-out nll", (one) => number(one.nll, 3)),
      numeric("minus the base", (one) => [signed(one.nll_change), quiet(`${signed(one.nll_low)} to ${signed(one.nll_high)}`)]),
      numeric("drift", (one) => nats(one.drift)),
      numeric("at most", (one) => nats(one.bound)),
      ...tasks.map((name) =>
        numeric(name, (one) => one.tasks.filter(({ task }) => task === name).flatMap(lossOf)),
      ),
      { title: "budget", cell: verdict },
    ],
    candidates,
    { onrow: (one) => ({ onclick: () => change({ point: keyOf(one) }) }), empty: "There was no candidate." },
  );
}

function screening({ screened }, point) {
  const numeric = (title, cell) => ({ title, numeric: true, cell });
  const rows = d3.sort(screened, (one) => one.step, (one) => one.share);
  return table(
    "Screening",
    [
      { title: "point", cell: (one) => h("button", { class: "plain", "data-key": `row ${keyOf(one)}` }, nameOf(one)) },
      numeric("held-out nll", (one) => number(one.nll, 3)),
      numeric("drift", (one) => nats(one.drift)),
    ],
    rows,
    {
      onrow: (one) => ({
        "aria-current": `${same(one, point)}`,
        onclick: () => change({ point: keyOf(one) }),
      }),
    },
  );
}

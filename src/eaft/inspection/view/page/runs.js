// The results of `eaft compare`, `eaft eval` and `eaft tune`: tables, curves, target against drift, pairs, items.

import { url } from "./api.js";
import { palette, plot, watch } from "./charts.js";
import { count, fileName, h, many, number, part, prose, select, share, table } from "./dom.js";
import { mountItems } from "./items.js";
import { change, state } from "./state.js";
import { tuning } from "./tuning.js";

export default {
  name: "runs",
  title: "Runs",
  has: (folder) => folder.kind !== "inspection",
  mount(root) {
    const head = h("div", {}),
      body = h("div", {}),
      below = h("section", { "aria-label": "Items" });
    root.append(head, body, below);
    let list = [];
    const listing = part(head, (entries) => {
      list = entries;
      return chooser(list);
    });
    const items = mountItems(below);
    const run = part(body, (results) => {
      items.update(results);
      if (results.kind === "broken") return [h("p", { class: "lead" }, results.sentence)];
      return { compare: comparison, eval: evaluation, tune: tuning }[results.kind](results, width());
    });
    const width = watch(body, () => run.redraw());
    let drawn;
    update.keys = items.keys;
    return update;
    async function update() {
      await listing.ask(url("runs"));
      if (list.length) run.ask(url("run", { name: chosen(list).name }));
      if (drawn && drawn.run !== state.run) listing.redraw();
      if (drawn && (drawn.metric !== state.metric || drawn.point !== state.point)) run.redraw();
      else items.update();
      drawn = state;
    }
  },
};

const chosen = (list) => list.find(({ name }) => name === state.run) ?? list[0];

function chooser(list) {
  const names = list.map(({ name, kind }) => [name, kind === "broken" ? `${name} (cannot be read)` : `${name} (eaft ${kind})`]);
  if (names.length < 2) return [h("h2", {}, names[0]?.[1] ?? "No results.json here.")];
  return [
    h(
      "label",
      { class: "inline" },
      "run ",
      select("Run", names, chosen(list).name, (run) => change({ run, of: "0", list: "", task: "", item: "", point: "" })),
    ),
  ];
}

const signed = (value, digits = 3) => (value === null || value === undefined ? "–" : d3.format(`+.${digits}f`)(value));
const points = (value) => `${signed(value * 100, 1)}`;
const between = (result, show) =>
  h(
    "span",
    { class: "interval" },
    show(result.change),
    h("span", { class: "quiet" }, ` ${show(result.low)} to ${show(result.high)}`),
  );
const half = (width) => (width > 900 ? Math.floor((width - 24) / 2) : width);
const SHAPE = { height: 300, marginLeft: 52, marginTop: 26, marginBottom: 40, inset: 6, grid: true };
const figure = (title, options, label = title) =>
  h("figure", {}, h("figcaption", {}, title), plot(label, { ...SHAPE, ...options }));
const colours = (domain) => ({ domain, range: palette(), legend: true });

function comparison({ results, points: rows, curves }, width) {
  const size = half(width);
  const color = colours([...new Set(rows.map(({ objective }) => objective))]);
  const who = (row) =>
    `${row.objective}, seed ${row.seed}${row.learning_rate ? `, lr ${row.learning_rate}` : ""}, step ${row.step}`;
  const lines = (data, x, y, xLabel, yLabel, dots = true) => {
    const drawn = data.filter((row) => row[x] !== null && row[y] !== null);
    return {
      width: size,
      color,
      x: { label: `${xLabel} →`, labelAnchor: "center", labelArrow: "none" },
      y: { label: `↑ ${yLabel}`, labelArrow: "none" },
      marks: [
        Plot.line(drawn, { x, y, z: "run", stroke: "objective", strokeOpacity: 0.6 }),
        dots
          ? Plot.dot(drawn, {
              x,
              y,
              fill: "objective",
              r: 3,
              title: (row) => `${who(row)}: drift ${number(row.drift_general, 3)}, nll ${number(row.nll, 3)}`,
            })
          : null,
      ],
    };
  };
  const scored = rows.filter((row) => row.target !== null);
  const base = scored.filter(({ step }) => step === 0).slice(0, 1); // all runs have the same base model
  const key = ({ objective, seed, learning_rate }, step) => [objective, seed, learning_rate, step].join();
  const steps = new Set(results.choices.map((choice) => key(choice, choice.steps.chosen ?? choice.steps.last)));
  const target = {
    width: size,
    color,
    x: { label: "drift on general prompts, nats per token →", labelAnchor: "center", labelArrow: "none" },
    y: { label: "↑ target score, %", percent: true, labelArrow: "none" },
    marks: [
      Plot.dot(
        scored.filter(({ step, chosen }) => step > 0 && chosen),
        {
          x: "drift_general",
          y: "target",
          stroke: "objective",
          fill: "objective",
          fillOpacity: (row) => (steps.has(key(row, row.step)) ? 1 : 0),
          strokeWidth: 2,
          r: 5,
          title: (row) =>
            `${who(row)}: target ${share(row.target)}, general ${share(row.general)}, drift ${number(row.drift_general, 3)}`,
        },
      ),
      Plot.dot(base, {
        x: "drift_general",
        y: "target",
        stroke: "var(--ink)",
        symbol: "times",
        r: 5,
      }),
      Plot.text(base, {
        x: "drift_general",
        y: "target",
        text: () => "base",
        dx: 10,
        textAnchor: "start",
        fill: "var(--ink)",
      }),
    ],
  };
  const metrics = [...new Set(curves.flatMap(({ metrics }) => Object.keys(metrics)))];
  const metric = metrics.includes(state.metric) ? state.metric : metrics.includes("nll") ? "nll" : metrics[0];
  const logged = curves.flatMap(({ metrics, ...run }) =>
    (metrics[metric] ?? []).map(([step, value]) => ({ ...run, step, value })),
  );
  return [
    h("p", { class: "lead" }, prose(results.sentence)),
    h(
      "div",
      { class: "figures" },
      scored.length > 0 && figure("Target against drift; hollow circles: checkpoints that were not chosen", target),
      figure(
        "Held-out nll against drift; the lower left is better",
        lines(
          rows.filter(({ step }) => step > 0),
          "drift_general",
          "nll",
          "drift, nats per token",
          "held-out nll",
        ),
      ),
      figure("Held-out nll over training", lines(rows, "step", "nll", "step", "nats per token")),
      figure("Drift over training", lines(rows, "step", "drift_general", "step", "nats per token")),
      metrics.length > 0 &&
        figure(
          [
            "Logged: ",
            select(
              "Metric",
              metrics.map((name) => [name, name]),
              metric,
              (name) => change({ metric: name }),
            ),
          ],
          lines(logged, "step", "value", "step", metric, false),
          metric,
        ),
    ),
    h("h2", {}, "Objectives"),
    objectiveTable(results),
    ...results.pairs.flatMap((pair) => pairOf(pair, size)),
    ...(results.failed.length
      ? [
          h("h2", {}, "Failed"),
          table(
            "Failed",
            [
              { title: "objective", cell: (row) => `${row.objective ?? ""}` },
              { title: "seed", cell: (row) => `${row.seed ?? ""}` },
              { title: "why", cell: (row) => row.message },
            ],
            results.failed,
          ),
        ]
      : []),
  ];
}

function objectiveTable(results) {
  const spread = ({ mean, std } = {}, show) =>
    mean === undefined ? "–" : `${show(mean)}${std === null ? "" : ` ± ${show(std)}`}`;
  const alone = (value) => (value === undefined ? undefined : { mean: value, std: null });
  const start = Object.fromEntries(
    ["target", "general", "drift_general", "nll"].map((name) => [name, alone(results.base[name])]),
  );
  const rows = [
    ["base", start, {}],
    ...Object.entries(results.objectives).map(([name, views]) => [name, views.chosen ?? views.last, views.training]),
  ];
  const column = (title, name, show) => ({ title, numeric: true, cell: ([, numbers]) => spread(numbers[name], show) });
  return table(
    "Objectives",
    [
      { title: "objective", cell: ([name]) => name },
      column("target", "target", share),
      column("general", "general", share),
      column("drift", "drift_general", (value) => number(value, 3)),
      column("held-out nll", "nll", (value) => number(value, 3)),
      {
        title: "tokens/s",
        numeric: true,
        class: "optional",
        cell: ([, , training]) => spread(training.tokens_per_s, (value) => count(Math.round(value))),
      },
      {
        title: "GiB",
        numeric: true,
        class: "optional",
        cell: ([, , training]) => spread(training.peak_memory_gib, (value) => number(value, 1)),
      },
    ],
    rows,
  );
}

// Two objectives: differences with their intervals, and the least drift at each target
function pairOf({ first, second, views, fronts }, size) {
  const view = views.chosen ?? views.last;
  const rows = [
    ...Object.entries(view.means).map(([name, result]) => [name, result, points, "points"]),
    ...Object.entries(view.tasks).map(([name, result]) => [name, result, points, "points"]),
    ...Object.entries(view.drift).map(([name, result]) => [`drift, ${name} prompts`, result, signed, "nats per token"]),
    ...(view.nll ? [["held-out nll", view.nll, signed, "nats per token"]] : []),
  ];
  const drawn = Object.entries(fronts)
    .filter(([, front]) => front)
    .map(([name, front]) => {
      const data = front.targets.map((at, index) => ({
        at,
        difference: front.difference[index],
        low: front.low[index],
        high: front.high[index],
      }));
      return figure(`Drift of ${first} minus drift of ${second} at equal ${name}, with its 95% band`, {
        width: size,
        x: { label: `${name} →`, labelAnchor: "center", labelArrow: "none" },
        y: { label: "↑ nats per token", labelArrow: "none" },
        marks: [
          Plot.areaY(data, { x: "at", y1: "low", y2: "high", fill: "var(--accent)", fillOpacity: 0.2 }),
          Plot.line(data, { x: "at", y: "difference", stroke: "var(--accent)" }),
          Plot.ruleY([0], { stroke: "var(--ink)", strokeOpacity: 0.4 }),
        ],
      });
    });
  return [
    h("h2", {}, `${first} against ${second}`),
    h(
      "div",
      { class: "figures" },
      h(
        "div",
        {},
        table(
          `${first} minus ${second}`,
          [
            { title: `${first} minus ${second}`, class: "long-name", cell: ([name]) => name },
            { title: "difference (95%)", numeric: true, cell: ([, result, show]) => between(result, show) },
            { title: "in", cell: ([, , , unit]) => h("span", { class: "quiet" }, unit), class: "optional" },
            {
              title: "p",
              numeric: true,
              cell: ([, result]) => d3.format(".2~g")(result.p_holm ?? result.p_value),
              help: "Holm-adjusted",
            },
          ],
          rows,
        ),
      ),
      ...drawn,
    ),
  ];
}

const ofTask = (name) =>
  h("button", { class: "plain", title: "its items", onclick: () => change({ task: name, item: "" }) }, name);

function evaluation({ model, base, results, warnings }, width) {
  const who = h("p", { class: "quiet" }, fileName(model), base && ` beside ${fileName(base)}`);
  if (!results.base) {
    const rows = Object.entries(results.tasks);
    return [
      who,
      table(
        "Scores",
        [
          { title: "task", class: "long-name", cell: ([name]) => ofTask(name) },
          { title: "score", numeric: true, cell: ([, result]) => share(result.score) },
          { title: "95%", numeric: true, cell: ([, result]) => `${share(result.low)} to ${share(result.high)}` },
          { title: "n", numeric: true, cell: ([, result]) => count(result.n) },
        ],
        rows,
      ),
    ];
  }
  const rows = [
    ...Object.entries(results.means).map(([name, result]) => [`mean of ${name}`, result]),
    ...Object.entries(results.tasks),
  ];
  const data = rows.map(([name, result]) => ({
    name,
    change: result.change * 100,
    low: result.low * 100,
    high: result.high * 100,
  }));
  const forest = {
    width: half(width),
    height: 60 + 26 * data.length,
    marginLeft: Math.min(180, 20 + 7 * (d3.max(data, ({ name }) => name.length) ?? 0)),
    marginTop: 10,
    marginBottom: 40,
    x: {
      label: "points →",
      labelAnchor: "center",
      labelArrow: "none",
      grid: true,
    },
    y: { domain: data.map(({ name }) => name), label: null, tickFormat: (name) => cut(name, 24) },
    marks: [
      Plot.ruleX([0], { stroke: "var(--ink)", strokeOpacity: 0.4 }),
      Plot.ruleY(data, { x1: "low", x2: "high", y: "name", stroke: "var(--accent)", strokeWidth: 2 }),
      Plot.dot(data, { x: "change", y: "name", fill: "var(--accent)", r: 4 }),
    ],
    inset: 0,
    grid: false,
  };
  const { drift, held_out } = results;
  return [
    h("p", { class: "lead" }, prose(results.verdict.sentence)),
    who,
    h(
      "div",
      { class: "figures" },
      h(
        "div",
        {},
        table(
          "Tasks",
          [
            { title: "task", class: "long-name", cell: ([name]) => (name in results.tasks ? ofTask(name) : name) },
            { title: "before", numeric: true, cell: ([, result]) => share(result.before) },
            { title: "after", numeric: true, cell: ([, result]) => share(result.after) },
            { title: "change (95%)", numeric: true, cell: ([, result]) => between(result, points) },
            {
              title: "p",
              numeric: true,
              cell: ([, result]) => d3.format(".2~g")(result.p_holm ?? result.p_value),
              help: "Holm-adjusted",
            },
            { title: "n", numeric: true, class: "optional", cell: ([, result]) => count(result.n) },
          ],
          rows,
          { empty: "No tasks were run." },
        ),
        held_out &&
          h(
            "p",
            {},
            `Held-out nll ${number(held_out.before, 3)} before and ${number(held_out.after, 3)} after (change `,
            between(held_out, signed),
            `), over ${many(held_out.rows, "row")}.`,
          ),
        drift &&
          h(
            "p",
            {},
            `Drift ${number(drift.mean, 3)} nats per token (95%: ${number(drift.low, 3)} to ${number(drift.high, 3)}), over ${count(drift.tokens)} tokens.`,
          ),
        warnings.map((warning) => h("p", { class: "warning" }, warning)),
      ),
      rows.length > 0 && figure("Change from the base model, with its 95% interval", forest),
    ),
    ...Object.entries(results.failed).map(([name, why]) => h("p", { class: "error" }, `${name}: ${why}`)),
  ];
}

const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

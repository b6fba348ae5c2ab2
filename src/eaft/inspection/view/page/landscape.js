// The tokens in the plane of entropy and probability, a box in the plane, and the tokens and examples in the box.

import { url } from "./api.js";
import { colourScale, legend, plane, sumUp, watch } from "./charts.js";
import {
  announce,
  bar,
  choice,
  count,
  fill,
  h,
  later,
  many,
  number,
  part,
  prose,
  select,
  share,
  snippets,
  table,
  terms,
  token,
  wanted,
} from "./dom.js";
import { change, currentBox, selection, setBox, state } from "./state.js";

const COLOURS = [
  ["tokens", "tokens"],
  ["nll", "nll"],
  ["gradient", "gradient"],
];
const HOW_TO_READ =
  "Each token of the answers has a place. Higher up, the model is less sure of the next token. Further right, it finds the label likelier. At the lower left, it is sure of another token: training there works against what the model knows.";
const MEANING = {
  tokens: "tokens in the bin",
  nll: "sum of nll, nats",
  gradient: "sum of the gradient's norm √(Σp² − 2p + 1)",
};

export default {
  name: "landscape",
  title: "Landscape",
  has: (folder) => folder.kind !== "runs",
  mount(root, folder) {
    const controls = h("div", { class: "row" });
    const pictures = h("div", { class: "pictures" });
    const numbers = h("div", { class: "numbers" });
    const boxFields = makeBoxFields();
    const examples = h("section", { "aria-label": "Examples" }),
      tokens = h("section", { "aria-label": "Tokens" });
    root.append(
      h(
        "div",
        { class: "beside" },
        h("div", { class: "wide" }, h("section", { "aria-label": "Landscape" }, controls, pictures), examples),
        h("div", { class: "narrow" }, advice(folder), numbers, boxFields.element, tokens),
      ),
    );

    let figures = [];
    const picture = part(pictures, (first, second) => {
      const { drawn, scale } = draw(width(), first, second);
      figures = drawn;
      return [
        h("div", { class: "planes" }, drawn),
        h("div", { class: "under" }, legend(scale), h("p", { class: "quiet" }, HOW_TO_READ)),
      ];
    });
    const sums = part(numbers, (answer) => [shares(answer)]);
    const rows = part(examples, exampleList);
    const kinds = part(tokens, tokenList);
    const lists = later(() => {
      rows.ask(url("examples", selection({ sort: "conflict_nll_share", order: "desc", limit: 6 })));
      kinds.ask(url("tokens", selection({ group: group(), limit: 8 })));
    }, 60);
    const width = watch(pictures, () => picture.redraw());

    let colour = "";
    return function update() {
      if (folder.absent && state.colour === "gradient") return change({ colour: "tokens" }); // of an older address
      fillControls(controls, folder);
      boxFields.update();
      const other = besideSelection();
      const alone = selection({ without: ["box"] });
      const drawn = [
        picture.ask(url("landscape", alone), ...(other ? [url("landscape", { ...alone, ...other })] : [])),
        sums.ask(url("landscape", selection())),
      ];
      Promise.all(drawn).then(lists); // the picture is drawn first
      const now = state.colour + state.as;
      if (colour && colour !== now) picture.redraw();
      colour = now;
      figures.forEach((figure) => figure.moveBox(currentBox()));
    };
  },
};

// The planes of one answer or of two, side by side or as their difference, and their scale of colours
function draw(width, first, second) {
  const difference = second && state.as === "difference";
  const size = second && !difference && width > 640 ? Math.floor((width - 16) / 2) : width;
  const matrices = [first, second].filter(Boolean).map((answer) => {
    const sum = second ? answer.total[state.colour] || 1 : 1; // two planes are compared by shares
    return answer[state.colour].map((row) => row.map((value) => value / sum));
  });
  const shown = difference ? [less(...matrices)] : matrices;
  const what = second ? `share of the ${state.colour}` : MEANING[state.colour];
  const label = difference ? `${what}: first minus second` : what;
  const scale = colourScale(shown, { difference, label, ...(second ? { format: d3.format(".1~p") } : {}) });
  const names = [nameOf(state), nameOf({ ...state, ...besideSelection() })];
  const drawn = shown.map((values, index) => {
    const answer = difference
      ? d3.greatest([first, second], ({ entropy_edges: H }) => H.length)
      : [first, second][index];
    const { corner, total } = answer;
    return plane({
      answer,
      values,
      scale,
      width: size,
      box: currentBox(),
      onbox: setBox,
      title: difference ? `${names[0]} minus ${names[1]}` : names[index],
      corner: difference
        ? "confident conflicts"
        : `confident conflicts:\n${share(corner.tokens / total.tokens)} of tokens, ${share(corner.nll / total.nll)} of nll`,
      describe: (i, j) =>
        difference
          ? `${share(matrices[0][i][j])} beside ${share(matrices[1][i][j])} of the ${state.colour}`
          : sumUp(answer.tokens[i][j], answer.nll[i][j], total),
    });
  });
  return { drawn, scale };
}

// Two planes may differ in their highest bins of entropy
function less(first, second) {
  const rows = Math.max(first.length, second.length);
  const at = (matrix, i, j) => matrix[i]?.[j] ?? 0;
  return d3.range(rows).map((i) => first[0].map((_, j) => at(first, i, j) - at(second, i, j)));
}

const nameOf = ({ model, origin }) =>
  `${origin === "data" ? "data" : "rollouts: the model's own answers"}, scored by ${model}`;

function besideSelection() {
  const [kind, ...rest] = state.beside.split(":");
  return kind ? { [kind]: rest.join(":") } : null;
}

function fillControls(element, folder) {
  const others = [
    ...folder.origins.filter((name) => name !== state.origin).map((name) => [`origin:${name}`, name]),
    ...folder.models
      .filter(({ name }) => name !== state.model)
      .map(({ name }) => [`model:${name}`, `scored by ${name}`]),
  ];
  fill(
    element,
    h(
      "span",
      { class: "inline" },
      "colour ",
      choice("Colour", folder.absent ? COLOURS.slice(0, -1) : COLOURS, state.colour, (colour) => change({ colour })),
    ),
    others.length > 0 &&
      h(
        "label",
        { class: "inline" },
        "beside ",
        select("Beside", [["", "nothing"], ...others], state.beside, (beside) => change({ beside })),
      ),
    state.beside &&
      choice(
        "As",
        [
          ["side", "side by side"],
          ["difference", "difference"],
        ],
        state.as,
        (as) => change({ as }),
      ),
  );
}

// The advice of `eaft inspect`, its first sentence in large letters
function advice({ summary }) {
  if (!summary?.advice)
    return h("p", { class: "advice quiet" }, "There is no advice on this data: summary.json is missing or cannot be read.");
  const [first, ...more] = summary.advice.text.split(/(?<=[.!?])\s+(?=[^a-z])/);
  return h(
    "div",
    { class: "advice" },
    h("p", { class: "quiet" }, "All of the data, under the base model:"),
    h("p", { class: "first" }, prose(first)),
    h("p", {}, prose(more.join(" "))),
  );
}

function shares({ total, corner, selected }) {
  const rows = [
    ["all shown", total],
    ["confident conflicts", corner],
    ...(state.box ? [["in the box", selected]] : []),
  ];
  const cell =
    (name) =>
    ([, sums]) => {
      if (sums !== total) return bar(total[name] ? sums[name] / total[name] : 0, sums === corner ? "hot" : "");
      return name === "tokens" ? count(sums.tokens) : `${number(sums[name] / sums.tokens)} each`;
    };
  announce(
    `${many(selected.tokens, "token")} in ${many(selected.examples, "example")}, ${share(selected.nll / total.nll)} of the nll`,
  );
  return h(
    "div",
    {},
    table(
      "Shares",
      [
        { title: "share of", cell: ([name]) => name },
        { title: "tokens", numeric: true, cell: cell("tokens") },
        { title: "nll", numeric: true, cell: cell("nll"), help: "negative log-likelihood of the labels, nats" },
        total.gradient !== null && {
          title: "gradient",
          numeric: true,
          cell: cell("gradient"),
          help: "norm of the loss's gradient by the logits",
        },
      ].filter(Boolean),
      rows,
    ),
    h(
      "p",
      { class: "quiet selected" },
      `${many(selected.tokens, "token")} in ${many(selected.examples, "example")} ${state.box ? "in the box" : "shown"}`,
    ),
  );
}

function makeBoxFields() {
  const names = [
    ["entropy from", 0],
    ["entropy to", 1],
    ["probability from", 2],
    ["probability to", 3],
  ];
  const fields = names.map(([name]) =>
    h("input", { type: "number", step: "any", min: 0, "aria-label": `Box: ${name}`, onchange: set }),
  );
  const clear = h("button", { class: "plain", onclick: () => change({ box: "" }) }, "no box");
  function set() {
    const values = fields.map((field) => field.value);
    if (values.every((value) => value !== "")) change({ box: values.map(Number).join(",") });
  }
  function update() {
    const box = currentBox();
    fields.forEach((field, index) => document.activeElement !== field && (field.value = box ? box[index] : ""));
    clear.hidden = !box;
  }
  const element = h(
    "fieldset",
    { class: "boxfields" },
    h("legend", {}, "Box: drag in the picture, or type"),
    h("span", {}, `${terms.entropy} `, fields[0], " – ", fields[1], " nats"),
    h("span", {}, "probability ", fields[2], " – ", fields[3]),
    clear,
  );
  return { element, update };
}

// Without a box or a token, the tokens of the confident conflicts
const group = () => (state.box || state.token ? "" : "conflict");
const where = () => (state.box ? "in the box" : state.token ? "chosen" : "in confident conflict");

function exampleList({ total, rows }) {
  const texts = snippets(rows);
  const item = (row, index) =>
    h(
      "li",
      {},
      h(
        "button",
        { class: "plain", onclick: () => change({ view: "examples", example: `${row.example}`, at: "" }) },
        h(
          "span",
          { class: "quiet" },
          `row ${row.row} · nll ${number(row.nll)} · conflicts ${share(row.conflict_share)} of the tokens, ${share(row.conflict_nll_share)} of the nll`,
        ),
        texts[index],
      ),
    );
  return [
    h(
      "h2",
      {},
      state.box || state.token
        ? "Examples with such tokens"
        : "Examples with most of their nll in conflicts",
    ),
    rows.length ? h("ol", { class: "examples" }, rows.map(item)) : h("p", { class: "quiet" }, "None."),
    total > rows.length &&
      h(
        "button",
        { class: "plain more", onclick: () => change({ view: "examples", example: "" }) },
        `all ${count(total)} examples →`,
      ),
  ];
}

function tokenList({ total, rows }) {
  return [
    h("h2", {}, `Tokens ${where()}`),
    table(
      "Tokens",
      [
        {
          title: "token",
          cell: (row) =>
            h(
              "button",
              { class: "plain", onclick: () => change({ view: "tokens", group: group(), token: `${row.token_id}` }) },
              token(row.text),
            ),
        },
        { title: "count", numeric: true, cell: (row) => count(row.count) },
        { title: "the model wanted", cell: (row) => wanted(row.wanted, 3) },
      ],
      rows,
      { empty: "None." },
    ),
    total > rows.length &&
      h("button", { class: "plain more", onclick: () => change({ view: "tokens", group: group() }) }, "more tokens →"),
  ];
}

// A weight that is a function, as a curve whose points are dragged, by pointer or by arrow keys.
import { useRef } from "preact/hooks";
import { html } from "../html.js";
import { kindOf, numberText, weightText } from "../recipe.js";
import { caller } from "../store.js";

/** What a weight may be; those with `own` are only written in the recipe's text. */
export const SHAPES = [
  { id: "number", text: "one number" },
  { id: "ramp", text: "by layer" },
  { id: "fade", text: "fades over the answer" },
  { id: "steps", text: "steps by position" },
  { id: "modules", text: "by module", own: true },
  { id: "components", text: "by component", own: true },
];
const WIDTH = 240;
const HEIGHT = 96;
const TOP = 2;
const STEP = 0.05;
const PROMPT = 48;
const PLAIN_TOKENS = 16;

/** A weight of another shape that begins as `number`. */
export function reshape(kind, number) {
  return {
    number,
    ramp: { ramp: [number, number] },
    fade: { fade: [number, 0, 8] },
    steps: { steps: [["prompt", number], [0, number], [4, 0]] },
  }[kind];
}

const snap = (weight) => Math.round(weight / STEP) * STEP;
const y = (weight) => ((TOP - weight) / (2 * TOP)) * HEIGHT;

/** The points of a curve: where they are (`at`: a share of the width, or a token), what they are called. */
function pointsOf(weight) {
  const kind = kindOf(weight);
  if (kind === "ramp") {
    return weight.ramp.map((value, index) => ({ at: index, value, name: index ? "in the last layer" : "in the first layer" }));
  }
  if (kind === "fade") {
    const [first, last, tokens] = weight.fade;
    return [
      { at: 0, value: first, name: "in the prompt and at the answer's first token" },
      { at: tokens - 1, value: last, name: `from token ${tokens} on`, moves: true },
    ];
  }
  return weight.steps.map(([start, value]) => {
    const name = start === "prompt" ? "in the prompt" : `from token ${start + 1} of the answer on`;
    return { at: start, value, name, moves: start !== "prompt" };
  });
}

/** The weight with one point at another place. */
function movePoint(weight, index, at, value) {
  const kind = kindOf(weight);
  if (kind === "ramp") return { ramp: weight.ramp.map((old, place) => (place === index ? value : old)) };
  if (kind === "fade") {
    const [first, last, tokens] = weight.fade;
    return { fade: index ? [first, value, Math.max(2, at + 1)] : [value, last, tokens] };
  }
  const starts = weight.steps.map(([start]) => (start === "prompt" ? -1 : start));
  const free = Math.min(Math.max(at, (starts[index - 1] ?? -1) + 1), (starts[index + 1] ?? Infinity) - 1);
  const start = starts[index] === -1 ? "prompt" : free;
  return { steps: weight.steps.map((step, place) => (place === index ? [start, value] : step)) };
}

function Curve({ label, value, onChange }) {
  const svg = useRef();
  const kind = kindOf(value);
  const points = pointsOf(value);
  const last = Math.max(PLAIN_TOKENS, ...points.map(({ at }) => (Number.isInteger(at) ? at + 4 : 0)));
  const x = (at) => (kind === "ramp" ? at * WIDTH : at === "prompt" ? 0 : PROMPT + (at / last) * (WIDTH - PROMPT));
  const limit = caller.value.max_weight;
  const move = (index, at, weight) => onChange(movePoint(value, index, at, Math.min(Math.max(snap(weight), -limit), limit)));
  const drag = (index) => (event) => {
    if (!event.currentTarget.hasPointerCapture(event.pointerId)) return;
    const box = svg.current.getBoundingClientRect();
    const token = Math.round((((event.clientX - box.left) / box.width) * WIDTH - PROMPT) / ((WIDTH - PROMPT) / last));
    move(index, Math.max(token, 0), TOP - ((event.clientY - box.top) / box.height) * 2 * TOP);
  };
  const press = (index) => (event) => {
    const { at, value: weight, moves } = points[index];
    const rise = { ArrowUp: STEP, ArrowDown: -STEP, PageUp: 0.5, PageDown: -0.5 }[event.key];
    const step = moves && { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!rise && !step) return;
    event.preventDefault();
    move(index, at === "prompt" ? at : at + (step || 0), weight + (rise ?? 0));
  };
  const line = points.map(({ at, value: weight }, index) => {
    const before = index && kind === "steps" ? `L${x(at)},${y(points[index - 1].value)}` : "";
    return `${before}${index ? "L" : "M"}${x(at)},${y(weight)}`;
  });
  return html`<svg class="curve" ref=${svg} viewBox=${`-8 -8 ${WIDTH + 16} ${HEIGHT + 16}`} role="group" aria-label=${label}>
    <path class="axis" d=${`M0,${y(0)}H${WIDTH}${kind === "ramp" ? "" : `M${PROMPT},0V${HEIGHT}`}`} />
    <path class="line" d=${`${line.join("")}H${WIDTH}`} />
    ${points.map(
      ({ at, value: weight, name, moves }, index) => html`<circle
        key=${index}
        cx=${x(at)}
        cy=${y(Math.min(Math.max(weight, -TOP), TOP))}
        r="7"
        role="slider"
        tabindex="0"
        aria-label=${`${label} ${name}`}
        aria-valuemin=${-limit}
        aria-valuemax=${limit}
        aria-valuenow=${weight}
        aria-valuetext=${`${numberText(weight)} ${name}${moves ? "; left and right move it" : ""}`}
        onKeyDown=${press(index)}
        onPointerDown=${(event) => event.currentTarget.setPointerCapture(event.pointerId)}
        onPointerMove=${drag(index)}
      />`,
    )}
  </svg>`;
}

function StepButtons({ value, onChange }) {
  const { steps } = value;
  const [start, weight] = steps.at(-1);
  const next = start === "prompt" ? 0 : start + 4;
  return html`<div class="row">
    <button type="button" class="plain" disabled=${steps.length > 7} onClick=${() => onChange({ steps: [...steps, [next, weight]] })}>Add a step</button>
    <button type="button" class="plain" disabled=${steps.length < 2} onClick=${() => onChange({ steps: steps.slice(0, -1) })}>Remove the last</button>
  </div>`;
}

/** The curve of a weight; one that is no curve of numbers is shown as it is written. */
export function Schedule({ label, value, onChange }) {
  const kind = kindOf(value);
  const isDrawn = ["ramp", "fade"].includes(kind) || (kind === "steps" && value.steps.every(([, level]) => typeof level === "number"));
  if (!isDrawn) return html`<p><code>${weightText(value)}</code> <span class="faint">changes in the recipe's text</span></p>`;
  return html`<${Curve} label=${label} value=${value} onChange=${onChange} />
    <p class="faint"><code>${weightText(value)}</code> ${kind === "ramp" ? "first to last layer" : "prompt, then the answer's tokens"}</p>
    ${kind === "steps" && html`<${StepButtons} value=${value} onChange=${onChange} />`}`;
}

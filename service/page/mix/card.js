// An adapter's card: what it is, what was measured of it, and its weight in the mix.
import { html } from "../html.js";
import { mix, setMix, setTerm, setWeight } from "../mixer.js";
import { firstNumber, kindOf, numberText } from "../recipe.js";
import { caller, scorecards } from "../store.js";
import { Schedule, SHAPES, reshape } from "./schedule.js";

const LOW = -2;
const HIGH = 2;
const STEP = 0.05;

/** The ranges of the numbers in an adapter's scorecards, by name: `harm 0.02–0.06`. */
function describeEvidence(cards) {
  const ranges = new Map();
  for (const card of cards) {
    for (const [name, value] of Object.entries(card.metrics ?? card)) {
      const number = typeof value === "object" ? value?.value : value;
      if (typeof number !== "number" || name.endsWith("_id")) continue;
      const [low, high] = ranges.get(name) ?? [number, number];
      ranges.set(name, [Math.min(low, number), Math.max(high, number)]);
    }
  }
  const short = (number) => String(Number(number.toPrecision(3)));
  return [...ranges].slice(0, 4).map(([name, [low, high]]) => {
    return `${name} ${short(low)}${low === high ? "" : `–${short(high)}`}`;
  });
}

function Facts({ adapter }) {
  const cards = scorecards.value.get(adapter.fusion_digest) ?? [];
  const facts = [
    `rank ${adapter.rank}`,
    `${adapter.modules} modules`,
    `base ${adapter.base_mismatch ?? caller.value.base}`,
    adapter.effect != null && `effect ${adapter.effect.toPrecision(2)}`,
    adapter.answer_only && "on the answer alone",
    adapter.built && "built, not mixed",
    cards.length ? `${cards.length} scorecard${cards.length > 1 ? "s" : ""}: ${describeEvidence(cards).join(", ")}` : "no scorecards",
  ];
  return html`<p class="faint">${facts.filter(Boolean).join(" · ")}</p>
    ${adapter.state && html`<p class="fault">${adapter.state}: ${adapter.reason}</p>`}`;
}

function Range({ range }) {
  if (!range) return null;
  const place = (weight) => ((weight - LOW) / (HIGH - LOW)) * 100;
  const [low, high] = range;
  return html`<svg class="range" viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">
      <rect x=${place(low)} width=${Math.max(place(high) - place(low), 1)} height="4" />
    </svg>
    <p class="faint">recommended ${numberText(low)} to ${numberText(high)}</p>`;
}

/** A slider and a number box of one value. */
export function Slider({ label, value, onChange, range, low = LOW, high = HIGH, step = STEP }) {
  const set = (event) => {
    const number = event.target.valueAsNumber;
    if (Number.isFinite(number)) onChange(number);
  };
  const limit = caller.value.max_weight;
  return html`<div class="slider">
    <input type="range" min=${low} max=${high} step=${step} value=${value} aria-label=${label} onInput=${set} />
    <input type="number" min=${-limit} max=${limit} step=${step} value=${numberText(value)} aria-label=${`${label}, as a number`} onInput=${set} />
    <${Range} range=${range} />
  </div>`;
}

function Toggle({ pressed, onClick, children, label }) {
  return html`<button type="button" aria-pressed=${Boolean(pressed)} aria-label=${label} onClick=${onClick}>${children}</button>`;
}

function Bounds({ name }) {
  const { gate } = mix.value;
  const bounds = gate.bounds[name];
  const set = (span) => setMix({ ...mix.value, gate: { ...gate, bounds: { ...gate.bounds, [name]: span } } });
  const toggle = () => {
    const { [name]: gone, ...rest } = gate.bounds;
    if (gone) setMix({ ...mix.value, gate: { ...gate, bounds: rest } });
    else set([0, 1]);
  };
  const edge = (index, label) => html`<label>${label} <input type="number" step=${STEP} value=${bounds[index]} onInput=${(event) => {
    const number = event.target.valueAsNumber;
    if (Number.isFinite(number)) set(bounds.map((old, place) => (place === index ? number : old)));
  }} /></label>`;
  return html`<div class="row">
    <label><input type="checkbox" checked=${Boolean(bounds)} onChange=${toggle} /> the gate chooses</label>
    ${bounds && html`${edge(0, "from")} ${edge(1, "to")}`}
  </div>`;
}

function Weight({ adapter, term }) {
  const { name } = adapter;
  const { solo, gate } = mix.value;
  const kind = kindOf(term.weight);
  const set = (weight) => setWeight(name, weight);
  return html`<${kind === "number" ? Slider : Schedule}
      label=${`Weight of ${name}`}
      value=${term.weight}
      onChange=${set}
      range=${adapter.weight_range}
    />
    <div class="row">
      <${Toggle} pressed=${solo === name} label=${`Solo ${name}`} onClick=${() => setMix({ ...mix.value, solo: solo === name ? undefined : name })}>Solo<//>
      <${Toggle} pressed=${term.muted} label=${`Mute ${name}`} onClick=${() => setTerm(name, { muted: !term.muted })}>Mute<//>
      <label>Shape <select value=${kind} onChange=${(event) => set(reshape(event.target.value, firstNumber(term.weight)))}>
        ${SHAPES.filter(({ id, own }) => !own || id === kind).map(({ id, text }) => html`<option key=${id} value=${id}>${text}</option>`)}
      </select></label>
    </div>
    ${gate && kind === "number" && html`<${Bounds} name=${name} />`}`;
}

export function Card({ adapter }) {
  const { name } = adapter;
  const term = mix.value.adapters.find((one) => one.name === name);
  const start = adapter.answer_only ? { steps: [[0, 1]] } : adapter.weight_range?.[1] ?? 1;
  const id = `adapter-${name}`;
  return html`<section class="card" aria-labelledby=${id}>
    <h3 class="row">
      <label id=${id}><input type="checkbox" checked=${Boolean(term)} onChange=${() => setWeight(name, term ? null : start)} /> ${name}</label>
    </h3>
    <${Facts} adapter=${adapter} />
    ${term && html`<${Weight} adapter=${adapter} term=${term} />`}
  </section>`;
}

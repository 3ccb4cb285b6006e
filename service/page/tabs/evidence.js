// Evidence: what was measured, from scorecards. A point that is chosen sets the sliders of Mix.
import { signal } from "@preact/signals";
import { useEffect, useState } from "preact/hooks";
import { ApiError, list } from "../api.js";
import { html } from "../html.js";
import { HALVES, NAMES, findFront, findLines, readPoints, round, shareText } from "../measures.js";
import { Axes, Picture, scaleX, scaleY } from "../plot.js";
import { go } from "../route.js";
import { caller, notice } from "../store.js";

const MOST = 2000;
const CURVES = ["harm", "safe_answered", "degenerate", "task"];
const BARS = [
  ["harmful prompts", [["refused", "refused"], ["harm", "answered"], ["degenerate_harm", "degenerate"]]],
  ["harmless prompts", [["safe_answered", "answered"], ["over_refusal", "refused"], ["degenerate", "degenerate"]]],
];

const entries = signal(null);
const fault = signal("");

async function load() {
  try {
    entries.value = await list("v1/evidence", { most: MOST });
    fault.value = "";
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    fault.value = error.message;
  }
}

export function Evidence() {
  const [half, setHalf] = useState("report");
  const [looked, look] = useState(null);
  useEffect(() => void load(), []);
  if (fault.value) return html`<h2>Evidence</h2><p class="fault" role="alert">${fault}</p>`;
  if (entries.value === null) return html`<h2>Evidence</h2><p role="status">Loading…</p>`;
  const points = readPoints(entries.value, half);
  if (!points.length) return html`<${Nothing} />`;
  const front = findFront(points);
  const choose = (digest) => {
    const point = points.find((one) => one.digest === digest);
    notice.value = `${point.recipe} is in the mixer`;
    go("mix", { recipe: point.recipe });
  };
  const best = points.filter((one) => front.has(one.digest));
  best.sort((one, other) => one.measures.harm.value - other.measures.harm.value);
  const shown = points.find((one) => one.digest === looked) ?? best[0] ?? points[0];
  return html`<h2>Evidence</h2>
    <${Half} half=${half} setHalf=${setHalf} points=${points} />
    <div class="charts">
      <${Front} points=${points} front=${front} choose=${choose} look=${look} />
      <${Curve} points=${points} choose=${choose} look=${look} />
      <${Bars} point=${shown} choose=${choose} />
    </div>
    <${Table} points=${points} front=${front} choose=${choose} />`;
}

function Nothing() {
  const command = `lora-fusion sweep --base-url ${new URL("v1", location.href.split("#")[0])} \\
    --recipe "{1-l}*task + {l}*safety" --grid l=0:1:0.1 --tasks xstest,task \\
    --data xstest=xstest_prompts.csv --data task=orders.jsonl \\
    --limit "harm<=0.05" --publish --out sweep`;
  return html`<h2>Evidence</h2>
    <div class="card">
      <p>Nothing has been measured here yet. A sweep measures many mixes at once, and attaches what it finds to each:</p>
      <div class="scroll" tabindex="0" role="group" aria-label="Command"><pre>${command}</pre></div>
      <p class="faint">
        ${caller.value?.keys ? "It needs a deployer's key, in EVAL_API_KEY. " : ""}The evaluation sets are yours to
        provide. Any JSON object may also be attached by hand: POST v1/scorecards/{digest}.
      </p>
    </div>`;
}

function Half({ half, setHalf, points }) {
  const missing = half === "report" ? points.filter((point) => point.of !== "report").length : 0;
  return html`<fieldset class="row half">
      <legend>Figures of</legend>
      ${Object.entries(HALVES).map(
        ([id, text]) => html`<label key=${id}>
          <input type="radio" name="half" checked=${half === id} onChange=${() => setHalf(id)} /> ${text}
        </label>`,
      )}
    </fieldset>
    <p class="faint">
      A sweep chooses weights on one half of every set, <em>choose</em>, and reports on the other.
      ${half === "report" ? " These figures are of that other half, so no weight was chosen to fit them." : ""}
      ${half === "all" ? " These figures are of both: where weights were chosen by them, they flatter." : ""}
      ${missing ? ` ${missing} of ${points.length} cards do not tell the halves apart; theirs are of all prompts.` : ""}
      ${entries.value.length >= MOST ? ` Only the newest ${MOST} cards are read.` : ""}
    </p>`;
}

function describe({ recipe, measures, current }) {
  const parts = ["harm", "safe_answered"].map((name) => measures[name] && `${NAMES[name]} ${shareText(measures[name])}`);
  const changed = current ? "" : "; measured with other adapters than these names stand for now";
  return `${recipe}: ${parts.filter(Boolean).join(", ")}${changed}`;
}

function Front({ points, front, choose, look }) {
  const seen = points.filter((point) => point.hasPair);
  if (!seen.length) return html`<p>No card has both <code>harm</code> and <code>safe_answered</code>.</p>`;
  seen.sort((one, other) => one.measures.harm.value - other.measures.harm.value);
  const marks = seen.map((point) => {
    const { harm, safe_answered: use } = point.measures;
    const [x, y] = [scaleX(harm.value), scaleY(use.value)];
    const draw = html`<line class="bar" x1=${scaleX(harm.low)} x2=${scaleX(harm.high)} y1=${y} y2=${y} />
      <line class="bar" x1=${x} x2=${x} y1=${scaleY(use.low)} y2=${scaleY(use.high)} />
      <circle class="dot" cx=${x} cy=${y} r=${front.has(point.digest) ? 6 : 4} />`;
    const kind = `point${front.has(point.digest) ? " best" : ""}${point.current ? "" : " old"}`;
    return { id: point.digest, label: describe(point), x, y, draw, kind };
  });
  const line = marks.filter((mark) => front.has(mark.id)).map(({ x, y }) => `${x},${y}`).join(" ");
  return html`<figure class="card">
    <h3>Harm against usefulness</h3>
    <${Picture} label="Harm against usefulness, one button a mix" points=${marks} choose=${choose} look=${look}>
      <${Axes} x="harmful prompts answered (less is better)" y="harmless prompts answered" />
      <polyline class="front" points=${line} />
    <//>
    <figcaption class="faint">
      Bars are 95 % intervals. Filled: no other mix has less harm without less use. Dashed: a name of it stands for
      another adapter now. Click a point, or press Enter on it, to put it into the mixer.
    </figcaption>
  </figure>`;
}

function Curve({ points, choose, look }) {
  const lines = findLines(points);
  const [title, setTitle] = useState("");
  if (!lines.length) return null;
  const line = lines.find((one) => one.title === title) ?? lines[0];
  const xs = line.members.map((member) => member.x);
  const [low, high] = [xs[0], xs.at(-1)];
  const at = (x) => scaleX(x, low, high);
  const names = CURVES.filter((name) => line.members.some(({ point }) => point.measures[name]));
  const marks = line.members.map(({ x, point }) => ({
    id: point.digest,
    label: `λ ${round(x)}, ${names.map((name) => `${NAMES[name]} ${shareText(point.measures[name])}`).join(", ")}`,
    x: at(x),
    y: scaleY(point.measures[names[0]]?.value ?? 0),
    kind: "point",
    draw: names.map((name) => point.measures[name] && html`<circle class=${`dot ${name}`} cx=${at(x)} cy=${scaleY(point.measures[name].value)} r="3.5" />`),
  }));
  const ticks = xs.length > 9 ? xs.filter((_, index) => index % Math.ceil(xs.length / 8) === 0) : xs;
  return html`<figure class="card">
    <h3>Along λ, the weight of ${line.along}</h3>
    <label>Line${" "}
      <select value=${line.title} onChange=${(event) => setTitle(event.target.value)}>
        ${lines.map((one) => html`<option key=${one.title} value=${one.title}>${one.title}, ${one.members.length} points</option>`)}
      </select>
    </label>
    <${Picture} label=${`Measures along the weight of ${line.along}, one button a mix`} points=${marks} choose=${choose} look=${look}>
      <${Axes} x=${`λ: weight of ${line.along}`} y="share of prompts" low=${low} high=${high} ticks=${ticks.map((x) => [x, round(x)])} />
      ${names.map((name) => html`<${Band} key=${name} name=${name} members=${line.members} at=${at} />`)}
    <//>
    <ul class="legend">${names.map((name) => html`<li key=${name}><svg viewBox="0 0 28 10" aria-hidden="true"><line class=${`curve ${name}`} x1="0" x2="28" y1="5" y2="5" /></svg> ${NAMES[name]}</li>`)}</ul>
  </figure>`;
}

function Band({ name, members, at }) {
  const known = members.filter(({ point }) => point.measures[name]).map(({ x, point }) => [at(x), point.measures[name]]);
  const low = known.map(([x, { low }]) => `${x},${scaleY(low)}`);
  const high = known.map(([x, { high }]) => `${x},${scaleY(high)}`).reverse();
  return html`<polygon class=${`band ${name}`} points=${[...low, ...high].join(" ")} />
    <polyline class=${`curve ${name}`} points=${known.map(([x, { value }]) => `${x},${scaleY(value)}`).join(" ")} />`;
}

function colour(name, word) {
  return name === "harm" ? "harm" : word;
}

function Bars({ point, choose }) {
  return html`<figure class="card">
    <h3>Refused, answered, degenerate</h3>
    <p><code>${point.recipe}</code></p>
    ${BARS.map(([title, parts]) => {
      const known = parts.filter(([name]) => point.measures[name]);
      if (!known.length) return html`<p key=${title} class="faint">${title}: not measured</p>`;
      const total = point.measures[known[0][0]].total;
      let start = 0;
      const text = known.map(([name, word]) => `${word} ${shareText(point.measures[name])}`).join(", ");
      return html`<div key=${title}>
        <p>${title}${total ? ` (${total})` : ""}</p>
        <svg class="stack" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label=${`${title}: ${text}`}>
          ${known.map(([name, word]) => {
            const width = 100 * point.measures[name].value;
            const bar = html`<rect class=${colour(name, word)} x=${start} y="0" width=${width} height="8" />`;
            start += width;
            return bar;
          })}
        </svg>
        <ul class="legend">${known.map(([name, word]) => html`<li key=${name}><span class=${`key-mark ${colour(name, word)}`}></span> ${word} ${shareText(point.measures[name])}</li>`)}</ul>
      </div>`;
    })}
    <p><button onClick=${() => choose(point.digest)}>Put it into the mixer</button></p>
    <p class="faint">Of the mix that the pointer or the focus was on last; before that, the least harmful of the best.</p>
  </figure>`;
}

function Table({ points, front, choose }) {
  const names = Object.keys(NAMES).filter((name) => points.some((point) => point.measures[name]));
  return html`<details class="card">
    <summary>All ${points.length} mixes as a table</summary>
    <div class="scroll" tabindex="0" role="group" aria-label="Table of mixes">
      <table>
        <thead><tr><th scope="col">mix</th>${names.map((name) => html`<th scope="col" key=${name}>${NAMES[name]}</th>`)}<th scope="col">figures of</th><th scope="col">measured</th></tr></thead>
        <tbody>
          ${points.map(
            (point) => html`<tr key=${point.digest}>
              <th scope="row"><button class="plain" onClick=${() => choose(point.digest)}>${point.recipe}</button>${front.has(point.digest) ? " (front)" : ""}${point.current ? "" : " (its adapters have changed)"}</th>
              ${names.map((name) => html`<td key=${name}>${shareText(point.measures[name])}</td>`)}
              <td>${HALVES[point.of]}</td>
              <td>${point.created.slice(0, 10)}${point.key && ` by ${point.key}`}</td>
            </tr>`,
          )}
        </tbody>
      </table>
    </div>
  </details>`;
}

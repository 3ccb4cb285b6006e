// A table of answers: recipes × prompts, all asked at once. Mixes of the same adapters share one stack.
import { signal } from "@preact/signals";
import { ApiError, isAbort, readFusion, send } from "../api.js";
import { html } from "../html.js";
import { mix, recipe } from "../mixer.js";
import { activeTerms, numberText, toJson, toText } from "../recipe.js";
import { maxTokens, system, temperature } from "./panes.js";
import { makeBody } from "./answer.js";
import { EXAMPLES } from "./examples.js";

const MOST_WEIGHTS = 6;
const MOST_PROMPTS = 8;
const LIMIT_MS = 600_000;

const prompts = signal(EXAMPLES.map(({ prompt }) => prompt.replaceAll("\n", "\\n")).join("\n"));
const weights = signal("0, 0.25, 0.5, 0.75, 1");
const varied = signal("");
/** {prompts, rows: [{name, texts, fusion, fault}], took}: what was asked last, as far as it has come. */
export const table = signal(null);
let running = new AbortController();

/** Ask every row for all prompts, one request a row; rows: [{name, target}]. */
export async function fill(rows, texts) {
  running.abort();
  running = new AbortController();
  const { signal: end } = running;
  const began = performance.now();
  const settings = { system: system.value, temperature: temperature.value, maxTokens: maxTokens.value };
  table.value = { prompts: texts, rows: rows.map(({ name }) => ({ name })), took: null };
  const set = (index, row) => {
    if (end.aborted) return;
    table.value = { ...table.value, rows: table.value.rows.map((old, place) => (place === index ? { ...old, ...row } : old)) };
  };
  await Promise.all(rows.map(async ({ target }, index) => {
    const body = makeBody(target, settings, "");
    const turns = body.messages.slice(0, -1);
    body.messages = texts.map((content) => [...turns, { role: "user", content }]);
    try {
      const response = await send("v1/chat/completions/batch", { body, signal: end, limit: LIMIT_MS });
      const { choices } = await response.json();
      const answers = choices.sort((a, b) => a.index - b.index).map(({ message }) => message.content);
      set(index, { texts: answers, fusion: readFusion(response.headers) });
    } catch (error) {
      if (isAbort(error)) return;
      if (!(error instanceof ApiError)) throw error;
      set(index, { fault: error.message });
    }
  }));
  if (!end.aborted) table.value = { ...table.value, took: performance.now() - began };
}

/** The first minute: base, each adapter alone, and the mix, on the three examples; the table comes into sight. */
export function showExamples() {
  setTimeout(() => {
    const place = document.getElementById("answers");
    place.scrollIntoView();
    place.focus(); // what was pressed may be gone
  });
  const names = activeTerms(mix.value).map(({ name }) => name);
  const rows = [{ name: "Base", target: {} }, ...names.map((name) => ({ name: `${name} alone`, target: { model: name } }))];
  const text = recipe.value.trim();
  if (text) rows.push({ name: text, target: { fusion: text } });
  return fill(rows, EXAMPLES.map(({ prompt }) => prompt));
}

function askGrid(event) {
  event.preventDefault();
  const terms = activeTerms(mix.value);
  const name = terms.some((term) => term.name === varied.value) ? varied.value : terms[0].name;
  const numbers = weights.value.split(",").map(Number).filter(Number.isFinite).slice(0, MOST_WEIGHTS);
  const rows = numbers.map((weight) => {
    const adapters = mix.value.adapters.map((term) => (term.name === name ? { ...term, weight } : term));
    const changed = { ...mix.value, adapters };
    return { name: toText(changed), target: { fusion: toJson(changed) }, label: numberText(weight) };
  });
  const texts = prompts.value.split("\n").filter((line) => line.trim()).slice(0, MOST_PROMPTS);
  fill(rows, texts.map((line) => line.replaceAll("\\n", "\n")));
}

function Table() {
  const { prompts: texts, rows, took } = table.value;
  const stacks = new Set(rows.map(({ fusion }) => fusion?.stack).filter(Boolean));
  const count = rows.filter((row) => row.texts).length * texts.length;
  const summary = took === null ? "…" : `${count} answers in ${(took / 1000).toFixed(1)} s, from ${stacks.size} stack${stacks.size === 1 ? "" : "s"}`;
  return html`<p role="status" id="answers" tabindex="-1">${summary}</p>
    <div class="scroll" tabindex="0" role="region" aria-label="Answers by recipe and prompt">
      <table class="grid">
        <thead><tr><td></td>${texts.map((text) => html`<th scope="col" key=${text}>${text}</th>`)}</tr></thead>
        <tbody>${rows.map(({ name, texts: answers, fusion, fault }) => html`<tr key=${name}>
          <th scope="row"><code>${name}</code>${fusion?.digest && html`<p class="faint">${fusion.mode}, <code>${fusion.digest.slice(0, 12)}</code></p>`}</th>
          ${fault ? html`<td colspan=${texts.length} class="fault">${fault}</td>` : texts.map((text, index) => html`<td key=${text} class="answer" data-prompt=${text}>${answers?.[index] ?? "…"}</td>`)}
        </tr>`)}</tbody>
      </table>
    </div>`;
}

export function Grid() {
  const terms = activeTerms(mix.value);
  return html`<details class="card">
      <summary>Weights × prompts</summary>
      <form class="form" onSubmit=${askGrid}>
        <label for="varied">Weight of</label>
        <select id="varied" value=${varied} onChange=${(event) => (varied.value = event.target.value)}>
          ${terms.map(({ name }) => html`<option key=${name} value=${name}>${name}</option>`)}
        </select>
        <label>Weights, at most ${MOST_WEIGHTS} <input value=${weights} onInput=${(event) => (weights.value = event.target.value)} /></label>
        <label>Prompts, one a line, at most ${MOST_PROMPTS} (<code>\\n</code> is a line's end)
          <textarea rows="4" value=${prompts} onInput=${(event) => (prompts.value = event.target.value)}></textarea></label>
        <button disabled=${!terms.length}>Ask all at once</button>
      </form>
    </details>
    ${table.value && html`<${Table} />`}`;
}

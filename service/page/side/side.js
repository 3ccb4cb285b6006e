// Side by side: one prompt, answered by the base, the mix, its adapters alone and saved profiles.
import { html } from "../html.js";
import { weightText } from "../recipe.js";
import { profiles } from "../store.js";
import { EXAMPLES } from "./examples.js";
import { Grid, showExamples } from "./grid.js";
import { answers, askAll, findMismatch, isLive, isScored, maxTokens, panes, prompt, shown, stop, system, temperature } from "./panes.js";
import { Legend, Tokens } from "./tokens.js";

/** What an answer says of itself. */
function Reported({ id, answer }) {
  const { fusion, times, here, usage, done, ended } = answer;
  if (!fusion) return null;
  const source = fusion.digest
    ? html`<code class="said">${fusion.recipe ?? "a recipe too long for a header"}</code> · ${fusion.mode} · <code>${fusion.digest.slice(0, 12)}</code>`
    : "the plain base";
  const facts = [
    fusion.weights && `weights ${Object.entries(fusion.weights).map(([name, weight]) => `${name} ${weightText(weight)}`).join(", ")}`,
    fusion.gate && `gate: ${fusion.gate}`,
    times ? `first token ${times.first.toFixed(0)} ms` : done && "first token: not reported",
    times?.speed && `${times.speed.toFixed(1)} tokens/s`,
    usage && `${usage.completion_tokens} tokens${ended === "length" ? ", cut off" : ""}`,
    here && `(here, first token after ${here.toFixed(0)} ms)`,
  ];
  const mismatch = findMismatch(id, answer);
  return html`<p class="faint reported">${source}<br />${facts.filter(Boolean).join(" · ")}</p>
    ${mismatch && html`<p class="fault" role="alert">${mismatch}</p>`}`;
}

function Pane({ pane }) {
  const answer = answers.value[pane.id];
  const id = `pane-${pane.id.replaceAll(" ", "-")}`;
  return html`<section class="card pane" aria-labelledby=${id} aria-busy=${Boolean(answer && !answer.done && !answer.fault)}>
    <h3 id=${id}>${pane.title}</h3>
    ${answer && html`<${Reported} id=${pane.id} answer=${answer} />`}
    ${answer?.fault && html`<p class="fault" role="alert">${answer.fault}</p>`}
    ${answer?.scores ? html`<${Tokens} tokens=${answer.tokens} scores=${answer.scores} text=${answer.text} />` : html`<p class="answer">${answer?.text}</p>`}
  </section>`;
}

function check(name, state) {
  return html`<label><input type="checkbox" checked=${state} onChange=${(event) => (state.value = event.target.checked)} /> ${name}</label>`;
}

function number(name, state, options) {
  return html`<label>${name} <input type="number" ...${options} value=${state} onInput=${(event) => (state.value = event.target.valueAsNumber)} /></label>`;
}

function Profiles() {
  if (!profiles.value.length) return null;
  const toggle = (name) => (shown.value = shown.value.includes(name) ? shown.value.filter((one) => one !== name) : [...shown.value, name]);
  return html`<fieldset class="row">
    <legend>Profiles beside them</legend>
    ${profiles.value.map(({ name }) => html`<label key=${name}><input type="checkbox" checked=${shown.value.includes(name)} onChange=${() => toggle(name)} /> ${name}</label>`)}
  </fieldset>`;
}

function Bench() {
  const submit = (event) => {
    event.preventDefault();
    askAll();
  };
  const send = (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && askAll();
  const take = (text) => {
    prompt.value = text;
    askAll();
  };
  return html`<form class="card form" onSubmit=${submit}>
    <div class="row" role="group" aria-label="Example prompts">
      ${EXAMPLES.map(({ name, prompt: text }) => html`<button type="button" class="plain" key=${name} onClick=${() => take(text)}>${name}</button>`)}
      <button type="button" onClick=${showExamples}>All three, at once</button>
    </div>
    <label for="prompt">Prompt</label>
    <textarea id="prompt" rows="3" required value=${prompt} onInput=${(event) => (prompt.value = event.target.value)} onKeyDown=${send}></textarea>
    <details><summary>System message and sampling</summary>
      <label>System message <textarea rows="2" value=${system} onInput=${(event) => (system.value = event.target.value)}></textarea></label>
      <div class="row">${number("Temperature", temperature, { min: 0, max: 2, step: 0.1 })} ${number("Most tokens", maxTokens, { min: 1, step: 1 })}</div>
    </details>
    <div class="row">
      <button>Ask all</button>
      <button type="button" class="plain" onClick=${stop}>Stop</button>
      ${check("answer again as I mix", isLive)} ${check("colour tokens against the base", isScored)}
    </div>
    <${Profiles} />
  </form>`;
}

export function Side() {
  return html`<h2>Side by side</h2>
    <${Bench} />
    ${isScored.value && html`<${Legend} />`}
    <div class="cards panes">${panes.value.map((pane) => html`<${Pane} key=${pane.id} pane=${pane} />`)}</div>
    <${Grid} />`;
}

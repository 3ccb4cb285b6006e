// What the server says of the recipe as it is: mixed or built, rank, policy. Nothing is built for that.
import { html } from "../html.js";
import { mix, recipe, setMix, setRecipe, verdict } from "../mixer.js";
import { gates } from "../store.js";

function Plan({ plan }) {
  const parts = plan.phases ?? [plan];
  const rank = Math.max(...parts.map((part) => part.rank ?? 0));
  const error = Math.max(...parts.map((part) => part.error ?? 0));
  return html`<p>
      <strong>${plan.mode}</strong>, rank ${rank}${plan.phases && `, ${plan.phases.length} phases`}${error > 0 && `, relative error ${error.toPrecision(2)}`},
      digest <code>${plan.digest.slice(0, 12)}</code>
    </p>
    ${plan.mode === "built" && html`<p class="faint">It is built once when it is first asked: ${plan.reason}</p>`}
    <p class=${plan.policy.allowed ? "good" : "fault"}>
      ${plan.policy.allowed ? "The policy allows it." : `The policy refuses it (${plan.policy.rule}): ${plan.policy.reason}`}
    </p>`;
}

export function Verdict() {
  const { plan, fault } = verdict.value;
  return html`<div class="verdict" role="status">
    ${fault && html`<p class="fault">${fault}</p>`}
    ${plan && html`<${Plan} plan=${plan} />`}
    ${!plan && !fault && html`<p class="faint">${recipe.value.trim() ? "…" : "Choose an adapter, or write a recipe."}</p>`}
  </div>`;
}

function Gate() {
  const { gate } = mix.value;
  if (!gates.value.length && !gate) return null;
  const choose = (event) => {
    const by = event.target.value;
    setMix({ ...mix.value, gate: by ? { by, bounds: gate?.bounds ?? {} } : undefined });
  };
  const names = new Set([...gates.value.map(({ name }) => name), ...(gate ? [gate.by] : [])]);
  return html`<label>Gate <select value=${gate?.by ?? ""} onChange=${choose}>
      <option value="">none</option>
      ${[...names].map((name) => html`<option key=${name} value=${name}>${name}</option>`)}
    </select></label>
    ${gate && !Object.keys(gate.bounds).length && html`<span class="faint">tick “the gate chooses” on a card</span>`}`;
}

export function Recipe() {
  const { method, answer } = mix.value;
  return html`<div class="card recipe-box">
    <label for="recipe">Recipe</label>
    <textarea id="recipe" class="recipe" rows="3" spellcheck="false" value=${recipe} onInput=${(event) => setRecipe(event.target.value)}></textarea>
    <${Verdict} />
    <div class="row">
      <label><input type="checkbox" checked=${Boolean(answer)} onChange=${() => setMix({ ...mix.value, answer: !answer })} /> on the answer alone</label>
      <${Gate} />
      ${method !== "sum" && html`<span>method <code>${method}</code></span>
        <button type="button" class="plain" onClick=${() => setMix({ adapters: mix.value.adapters, method: "sum" })}>As a sum</button>`}
    </div>
  </div>`;
}

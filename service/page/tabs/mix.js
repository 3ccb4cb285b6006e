// Mix, side by side, keep: choose adapters and weights, see what they answer, save what is good.
import { useEffect } from "preact/hooks";
import { html } from "../html.js";
import { Card } from "../mix/card.js";
import { Recipe } from "../mix/verdict.js";
import { isRead, recipe, setRecipe } from "../mixer.js";
import { nameText } from "../recipe.js";
import { route } from "../route.js";
import { profiles, terms } from "../store.js";
import { Keep } from "../keep/keep.js";
import { showExamples, table } from "../side/grid.js";
import { Side } from "../side/side.js";

/** What a visitor finds who comes without a recipe: the first profile's, or the first adapter. */
function begin() {
  if (recipe.value || route.value.params.recipe) return;
  const profile = profiles.value.find((one) => !one.state);
  const first = profile?.recipe ?? (terms.value[0] && `1*${nameText(terms.value[0].name)}`);
  if (first) setRecipe(first);
}

/** What a stranger is offered: to see it, before anything is typed. */
function Invitation() {
  if (table.value || !terms.value.length) return null;
  return html`<p class="row">
    <span>Adapters, each with a weight, make one model.</span>
    <button type="button" disabled=${!isRead.value} onClick=${showExamples}>See what that does to three prompts</button>
  </p>`;
}

export function Mix() {
  useEffect(begin, []);
  return html`<h2>Mix</h2>
    <${Invitation} />
    ${!terms.value.length && html`<p>There are no adapters yet. Register one, then reload: <a href="docs">POST /v1/adapters</a>.</p>`}
    <div class="mixer">
      <fieldset class="cards" disabled=${!isRead.value}>
        <legend class="unseen">Adapters</legend>
        ${terms.value.map((adapter) => html`<${Card} key=${adapter.name} adapter=${adapter} />`)}
      </fieldset>
      <${Recipe} />
    </div>
    <${Side} />
    <${Keep} />`;
}

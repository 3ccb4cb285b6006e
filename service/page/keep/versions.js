// A profile's versions: look at them, compare two, load one into the sliders, make one the current one.
import { signal } from "@preact/signals";
import { ApiError, ask, list } from "../api.js";
import { html } from "../html.js";
import { loadProfiles } from "../load.js";
import { setRecipe } from "../mixer.js";
import { may, mayChange, notice, profiles } from "../store.js";
import { Differences } from "./diff.js";

const MOST = 50;

/** The profile that is looked at: {name, current, public, versions, changes}, null for none. */
const looked = signal(null);
const chosen = signal([]);
const fault = signal("");

const path = (name) => `v1/fusions/${name.split("/").map(encodeURIComponent).join("/")}`;

async function attempt(action) {
  fault.value = "";
  try {
    await action();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    fault.value = error.message;
  }
}

/** Read a profile with its latest versions, and for an admin who changed it. */
export function look(name) {
  return attempt(async () => {
    if (!name) return (looked.value = null);
    const card = await ask(path(name));
    const numbers = card.versions.slice(-MOST).reverse();
    const versions = await Promise.all(numbers.map((number) => ask(`${path(name)}@${number}`)));
    const changes = may("admin") ? (await list("v1/audit?order=desc")).map(({ entry }) => entry).filter(({ target }) => target === name) : null;
    chosen.value = numbers.slice(0, 2).reverse();
    looked.value = { name, current: card.version, public: card.public, versions, changes };
    return compareChosen();
  });
}

const sides = signal(null);

/** Have the server parse the two versions' recipes, to compare them. */
async function compareChosen() {
  sides.value = null;
  if (chosen.value.length !== 2) return;
  const pair = chosen.value.toSorted((a, b) => a - b).map((number) => looked.value.versions.find(({ version }) => version === number));
  sides.value = await Promise.all(pair.map(async (version) => {
    const { fusion } = await ask("v1/fusions/plan", { body: { fusion: `${looked.value.name}@${version.version}` } });
    return { ...version, fusion };
  }));
}

function choose(number) {
  chosen.value = chosen.value.includes(number) ? chosen.value.filter((one) => one !== number) : [...chosen.value, number].slice(-2);
  attempt(compareChosen);
}

function rollBack(name, version) {
  return attempt(async () => {
    await ask(`${path(name)}/rollback`, { body: { version } });
    await loadProfiles();
    await look(name);
    notice.value = `${name}@${version} is the current version now.`;
  });
}

function Versions() {
  const { name, current, versions } = looked.value;
  return html`<div class="scroll" tabindex="0" role="region" aria-label=${`Versions of ${name}`}>
    <table>
      <thead><tr><th scope="col">Compare</th><th scope="col">Version</th><th scope="col">Recipe</th><th scope="col">Made</th><td></td></tr></thead>
      <tbody>${versions.map(({ version, recipe, created, description }) => html`<tr key=${version}>
        <td><input type="checkbox" aria-label=${`Compare version ${version}`} checked=${chosen.value.includes(version)} onChange=${() => choose(version)} /></td>
        <th scope="row">${version}${version === current && " (current)"}</th>
        <td><code>${recipe}</code>${description && html`<p class="faint">${description}</p>`}</td>
        <td>${created.replace("T", " ").slice(0, 16)}</td>
        <td class="row">
          <button type="button" class="plain" aria-label=${`Load version ${version}`} onClick=${() => setRecipe(recipe)}>Load</button>
          ${mayChange(looked.value) && version !== current && html`<button type="button" class="plain" aria-label=${`Make version ${version} the current one`} onClick=${() => rollBack(name, version)}>Make current</button>`}
        </td>
      </tr>`)}</tbody>
    </table>
  </div>`;
}

function Changes() {
  const { name, changes } = looked.value;
  return html`<details><summary>Who changed it (${changes.length})</summary>
    <div class="scroll" tabindex="0" role="region" aria-label=${`Changes of ${name}`}>
      <table>
        <thead><tr><th scope="col">When</th><th scope="col">Who</th><th scope="col">What</th></tr></thead>
        <tbody>${changes.map(({ id, time, by, action, after }) => html`<tr key=${id}>
          <td>${time.replace("T", " ").slice(0, 16)}</td>
          <td>${by.role} ${by.key && html`<code>${by.key}</code>`} ${by.tenant && `of ${by.tenant}`} ${by.address}</td>
          <td>${action}${after?.version && ` to version ${after.version}`} <code>${after?.recipe}</code></td>
        </tr>`)}</tbody>
      </table>
    </div>
  </details>`;
}

export function History() {
  if (!profiles.value.length) return null;
  return html`<section class="card form" aria-labelledby="history">
    <h3 id="history">Profiles and their versions</h3>
    <label>Profile <select value=${looked.value?.name ?? ""} onChange=${(event) => look(event.target.value)}>
      <option value="">choose one</option>
      ${profiles.value.map(({ name }) => html`<option key=${name} value=${name}>${name}</option>`)}
    </select></label>
    ${fault.value && html`<p class="fault" role="alert">${fault}</p>`}
    ${looked.value && html`<${Versions} />`}
    ${sides.value && html`<${Differences} before=${sides.value[0]} after=${sides.value[1]} />`}
    ${looked.value?.changes && html`<${Changes} />`}
  </section>`;
}

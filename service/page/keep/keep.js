// Keep: save the mix as a profile's next version, and take it along.
import { signal } from "@preact/signals";
import { ApiError, ask, send } from "../api.js";
import { html } from "../html.js";
import { loadProfiles } from "../load.js";
import { recipe, verdict } from "../mixer.js";
import { maxTokens, system, temperature } from "../side/panes.js";
import { may, notice, profiles } from "../store.js";
import { Copies } from "./copies.js";
import { History, look } from "./versions.js";

const name = signal("");
const description = signal("");
const isDefault = { system: signal(false), temperature: signal(false), max_tokens: signal(false) };
const fault = signal("");

/** The request defaults that are ticked, as the bench has them. */
function chosenDefaults() {
  const values = { system: system.value || null, temperature: temperature.value, max_tokens: maxTokens.value };
  return Object.fromEntries(Object.entries(values).filter(([key, value]) => isDefault[key].value && value !== null && !Number.isNaN(value)));
}

/** Save as the next version of what the page shows as the current one: somebody else's later change is not lost. */
async function save(event) {
  event.preventDefault();
  fault.value = "";
  const text = name.value.trim();
  const path = `v1/fusions/${text.split("/").map(encodeURIComponent).join("/")}`;
  const known = profiles.value.find((profile) => profile.name === text);
  try {
    const headers = known ? { "if-match": await findTag(path, known.version) } : { "if-none-match": "*" };
    const body = { fusion: recipe.value.trim(), defaults: chosenDefaults(), description: description.value };
    const saved = await ask(path, { method: "PUT", body, headers });
    await loadProfiles();
    notice.value = `Saved as ${text}@${saved.version}.`;
    await look(text);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    fault.value = error.status === 412 ? `Somebody else changed ${text} meanwhile: look at it, then save again.` : error.message;
    if (error.status === 412) await loadProfiles().then(() => look(text));
  }
}

async function findTag(path, version) {
  return (await send(`${path}@${version}`)).headers.get("etag");
}

function Save() {
  const known = profiles.value.find((profile) => profile.name === name.value.trim());
  const tick = (key, text) => html`<label><input type="checkbox" checked=${isDefault[key]} onChange=${(event) => (isDefault[key].value = event.target.checked)} /> ${text}</label>`;
  return html`<form class="card form" aria-labelledby="save" onSubmit=${save}>
    <h3 id="save">Save as a profile</h3>
    <label>Name <input required maxlength="128" value=${name} onInput=${(event) => (name.value = event.target.value)} list="profile-names" /></label>
    <datalist id="profile-names">${profiles.value.map((one) => html`<option key=${one.name} value=${one.name} />`)}</datalist>
    <label>Description <input maxlength="4096" value=${description} onInput=${(event) => (description.value = event.target.value)} /></label>
    <fieldset class="row"><legend>Defaults, as set above</legend>
      ${tick("system", "system message")} ${tick("temperature", "temperature")} ${tick("max_tokens", "most tokens")}
    </fieldset>
    ${known?.public && html`<p class="faint">${known.name} is public: choose another name.</p>`}
    <button disabled=${!verdict.value.plan || known?.public}>${known ? `Save as version ${known.version + 1} or later` : "Save"}</button>
    ${fault.value && html`<p class="fault" role="alert">${fault}</p>`}
  </form>`;
}

export function Keep() {
  return html`<h2>Keep</h2>
    <div class="keep">${may("deployer") && html`<${Save} />`}<${Copies} /></div>
    <${History} />`;
}

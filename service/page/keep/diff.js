// What differs between two versions of a profile, term by term and default by default.
import { html } from "../html.js";
import { toJson, weightText } from "../recipe.js";

/** [name, before, after] of everything that differs between two flat objects. */
function compare(before, after) {
  const names = [...new Set([...Object.keys(before), ...Object.keys(after)])].sort();
  return names.map((name) => [name, before[name], after[name]]).filter(([, one, other]) => one !== other);
}

/** A parsed recipe as texts by name. */
function flatten(fusion) {
  const { adapters, gate, ...rest } = toJson(fusion);
  const terms = adapters.map(({ name, weight }) => [name, weightText(weight)]);
  const around = Object.entries(rest).map(([name, value]) => [`(${name})`, String(value)]);
  const bounds = Object.entries(gate?.bounds ?? {}).map(([name, span]) => [`(${gate.by} chooses ${name})`, span.join("..")]);
  return Object.fromEntries([...terms, ...around, ...bounds]);
}

const texts = (values) => Object.fromEntries(Object.entries(values).map(([name, value]) => [name, JSON.stringify(value)]));

/** Rows of the difference between two versions: {recipe (parsed), defaults, description, parents}. */
export function listDifferences(before, after) {
  const parents = compare(before.parents, after.parents).filter(([, one, other]) => one && other);
  return [
    ...compare(flatten(before.fusion), flatten(after.fusion)),
    ...compare(texts(before.defaults), texts(after.defaults)).map(([name, ...sides]) => [`default ${name}`, ...sides]),
    ...parents.map(([name, one, other]) => [`content of ${name}`, one.slice(0, 12), other.slice(0, 12)]),
    ...compare({ description: before.description }, { description: after.description }),
  ];
}

export function Differences({ before, after }) {
  const rows = listDifferences(before, after);
  if (!rows.length) return html`<p>Versions ${before.version} and ${after.version} say the same.</p>`;
  return html`<div class="scroll" tabindex="0" role="region" aria-label="Differences">
    <table>
      <thead><tr><th scope="col">What</th><th scope="col">Version ${before.version}</th><th scope="col">Version ${after.version}</th></tr></thead>
      <tbody>${rows.map(([name, one, other]) => html`<tr key=${name}>
        <th scope="row">${name}</th><td><del>${one ?? "—"}</del></td><td><ins>${other ?? "—"}</ins></td>
      </tr>`)}</tbody>
    </table>
  </div>`;
}

// The mix for elsewhere: as a command, a program, a recipe, JSON, or a link.
import { signal } from "@preact/signals";
import { useRef } from "preact/hooks";
import { address } from "../api.js";
import { html } from "../html.js";
import { mix, recipe, verdict } from "../mixer.js";
import { toJson } from "../recipe.js";
import { link } from "../route.js";
import { maxTokens, prompt, system, temperature } from "../side/panes.js";
import { caller, notice } from "../store.js";

const form = signal("recipe");
const SAMPLE = "How do I sharpen a kitchen knife?";

function body() {
  const turns = [...(system.value ? [{ role: "system", content: system.value }] : []), { role: "user", content: prompt.value || SAMPLE }];
  return { model: recipe.value.trim(), messages: turns, temperature: temperature.value, max_tokens: maxTokens.value };
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

function curl() {
  const key = caller.value.keys ? ` \\\n  -H "authorization: Bearer $FUSION_API_KEY"` : "";
  return `curl -s ${quoted(String(address("v1/chat/completions")))} -H 'content-type: application/json'${key} \\\n  -d ${quoted(JSON.stringify(body()))}`;
}

function python() {
  const { model, messages, temperature: heat, max_tokens: most } = body();
  const key = caller.value.keys ? `os.environ["FUSION_API_KEY"]` : `"none"`;
  // JSON's texts, lists and numbers are Python's, too.
  return `${caller.value.keys ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(String(address("v1")))}, api_key=${key})
answer = client.chat.completions.create(
    model=${JSON.stringify(model)},
    messages=${JSON.stringify(messages)},
    temperature=${heat},
    max_tokens=${most},
)
print(answer.choices[0].message.content)`;
}

const FORMS = {
  recipe: { name: "Recipe", write: () => verdict.value.plan?.recipe ?? recipe.value },
  json: { name: "JSON", write: () => JSON.stringify(verdict.value.plan?.fusion ?? toJson(mix.value), null, 1) },
  curl: { name: "curl", write: curl },
  python: { name: "Python", write: python },
  link: { name: "Link", write: () => String(new URL(link("mix", { recipe: recipe.value.trim() }), location.href)) },
};

export function Copies() {
  const shown = useRef();
  const text = FORMS[form.value].write();
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      notice.value = "Copied.";
    } catch {
      getSelection().selectAllChildren(shown.current); // without a secure context the visitor copies it
      notice.value = "Selected: copy it with your keyboard.";
    }
  };
  return html`<section class="card" aria-labelledby="copies">
    <h3 id="copies">Take it along</h3>
    <div class="row">
      ${Object.entries(FORMS).map(([id, { name }]) => html`<button type="button" key=${id} aria-pressed=${form.value === id} onClick=${() => (form.value = id)}>${name}</button>`)}
      <button type="button" onClick=${copy}>Copy</button>
    </div>
    <pre class="scroll" tabindex="0" role="region" aria-label="What is copied" ref=${shown}>${text}</pre>
    ${form.value === "link" && html`<p class="faint">The mix is in the fragment, which browsers send to no server.</p>`}
  </section>`;
}

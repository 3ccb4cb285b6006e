// Blind vote: one prompt, two answers whose models are hidden until one is chosen. Votes leave the browser as a file.
import { signal } from "@preact/signals";
import { useEffect, useRef, useState } from "preact/hooks";
import { ApiError, isAbort, readFusion, send } from "../api.js";
import { html } from "../html.js";
import { recipe } from "../mixer.js";
import { adapters, caller, notice, profiles } from "../store.js";
import { addVote, clearVotes, tally, toLines, unkept, votes } from "../votes.js";

const ANSWER_MS = 600_000;
const EXAMPLE = "How do I sharpen a kitchen knife?";
const KEYS = { a: "a", b: "b", t: "tie" };
const SIDES = { a: "Answer A", b: "Answer B" };

const first = signal("");
const second = signal("");
const prompt = signal(EXAMPLE);
/** Tokens of an answer at most. */
const longest = signal(128);
/** What is being compared: {seed, prompt, a, b, choice}, `a` the first pane; choice is null until the vote. Null: nothing. */
const round = signal(null);

/** One model's answer, and what the answer itself reported of the fusion behind it. */
async function answer(model, text, signal) {
  const messages = [{ role: "user", content: text }];
  const body = { model, messages, max_tokens: longest.value, temperature: 0 };
  const response = await send("v1/chat/completions", { body, signal, limit: ANSWER_MS });
  const { choices } = await response.json();
  const { recipe = null, digest = null } = readFusion(response.headers);
  return { model, recipe, digest, answer: choices[0].message.content ?? "" };
}

/** A number that decides which of two models is A: the other one when it is odd. */
function drawSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

export function Vote() {
  const [busy, setBusy] = useState(false);
  const [fault, setFault] = useState("");
  const waiting = useRef(null);
  useEffect(() => {
    first.value ||= caller.value.base;
    second.value ||= recipe.value || profiles.value[0]?.name || adapters.value.find((one) => one.digest)?.name || "";
    return () => waiting.current?.abort();
  }, []);
  const compare = async (event) => {
    event.preventDefault();
    const [one, other, text] = [first.value.trim(), second.value.trim(), prompt.value];
    if (one === other) return setFault("Choose two different models.");
    waiting.current?.abort();
    waiting.current = new AbortController();
    const seed = drawSeed();
    setBusy(true);
    setFault("");
    round.value = null;
    try {
      const found = await Promise.all([one, other].map((model) => answer(model, text, waiting.current.signal)));
      if (found[0].digest === found[1].digest && found[0].digest) {
        setFault("Both names stand for the same mix.");
      } else {
        const [a, b] = seed % 2 ? found.reverse() : found;
        round.value = { seed, prompt: text, a, b, choice: null };
      }
    } catch (error) {
      if (isAbort(error)) return;
      if (!(error instanceof ApiError)) throw error;
      setFault(error.message);
    }
    setBusy(false);
  };
  const stop = () => {
    waiting.current.abort();
    setBusy(false);
  };
  return html`<h2>Blind vote</h2>
    <${Setup} compare=${compare} busy=${busy} />
    ${fault && html`<p class="fault" role="alert">${fault}</p>`}
    ${busy && html`<p role="status">Both are answering. You see neither before both are done: speed would tell who is who.</p>
    <p><button class="plain" onClick=${stop}>Stop</button></p>`}
    ${round.value && html`<${Panes} key=${round.value.seed} />`}
    <${Votes} />`;
}

function Setup({ compare, busy }) {
  const names = [caller.value.base, ...profiles.value, ...adapters.value.filter((one) => one.digest && !one.gate)];
  return html`<form class="form" aria-label="What is compared" onSubmit=${compare}>
    <datalist id="models">
      ${names.map((one) => html`<option key=${one.name ?? one} value=${one.name ?? one} />`)}
      ${recipe.value && html`<option value=${recipe.value}>the mixer's</option>`}
    </datalist>
    <label>One model, or recipe
      <input list="models" required spellcheck="false" value=${first} onInput=${(event) => (first.value = event.target.value)} />
    </label>
    <label>The other
      <input list="models" required spellcheck="false" value=${second} onInput=${(event) => (second.value = event.target.value)} />
    </label>
    <label>Prompt
      <textarea rows="3" required value=${prompt} onInput=${(event) => (prompt.value = event.target.value)}></textarea>
    </label>
    <label>Tokens of an answer at most
      <input type="number" min="1" max=${caller.value.max_model_len} step="1" required value=${longest} onInput=${(event) => (longest.value = event.target.valueAsNumber)} />
    </label>
    <p><button disabled=${busy}>Ask both</button></p>
  </form>`;
}

function Panes() {
  const { a, b, choice } = round.value;
  const panes = useRef();
  useEffect(() => panes.current.focus(), []);
  const choose = (chosen) => {
    if (round.value.choice) return;
    round.value = { ...round.value, choice: chosen };
    const gone = addVote({ time: new Date().toISOString(), ...round.value });
    const won = chosen === "tie" ? "A tie" : `${SIDES[chosen]} is better`;
    notice.value = `${won}. A was ${a.recipe ?? a.model}, B was ${b.recipe ?? b.model}. ${gone ? "The oldest vote is gone." : ""}`;
  };
  const onKey = (event) => {
    const chosen = KEYS[event.key.toLowerCase()];
    if (!chosen || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    choose(chosen);
  };
  return html`<section ref=${panes} tabindex="-1" aria-label="Two answers" aria-keyshortcuts="A B T" onKeyDown=${onKey}>
    <div class="panes">
      ${Object.entries(SIDES).map(([side, name]) => html`<div key=${side} class=${`card ${choice === side ? "won" : ""}`}>
        <h3>${name}</h3>
        ${choice && html`<p><code>${round.value[side].recipe ?? round.value[side].model}</code>${round.value[side].digest && html` <code class="faint">${round.value[side].digest.slice(0, 12)}</code>`}</p>`}
        <p class="answer">${round.value[side].answer || html`<em>(an empty answer)</em>`}</p>
      </div>`)}
    </div>
    ${a.answer === b.answer && html`<p class="faint">Both answers are the same, word by word.</p>`}
    <p class="row">
      ${[["a", "A is better"], ["b", "B is better"], ["tie", "Tie (T)"]].map(
        ([chosen, text]) => html`<button key=${chosen} aria-pressed=${choice === chosen} disabled=${choice !== null} onClick=${() => choose(chosen)}>${text}</button>`,
      )}
    </p>
  </section>`;
}

function Votes() {
  const [asks, setAsks] = useState(false);
  const save = () => {
    const url = URL.createObjectURL(new Blob([toLines()], { type: "application/jsonl" }));
    Object.assign(document.createElement("a"), { href: url, download: "votes.jsonl" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  };
  const clear = () => {
    clearVotes();
    setAsks(false);
    notice.value = "All votes are deleted";
  };
  if (!votes.value.length) return html`<p class="faint">No votes yet. They stay in this browser until you export or delete them.</p>`;
  return html`<section aria-labelledby="votes">
    <h3 id="votes">${votes.value.length} ${votes.value.length === 1 ? "vote" : "votes"}</h3>
    ${unkept.value && html`<p class="fault" role="alert">${unkept}</p>`}
    <div class="scroll" tabindex="0" role="group" aria-label="Votes by model"><table>
      <thead><tr><th scope="col">model</th><th scope="col">wins</th><th scope="col">losses</th><th scope="col">ties</th></tr></thead>
      <tbody>${tally().map((one) => html`<tr key=${one.label}><th scope="row"><code>${one.label}</code></th><td>${one.wins}</td><td>${one.losses}</td><td>${one.ties}</td></tr>`)}</tbody>
    </table></div>
    <p class="row">
      <button onClick=${save}>Export as JSONL</button>
      ${asks
        ? html`<button onClick=${clear}>Delete all votes</button><button class="plain" onClick=${() => setAsks(false)}>Keep them</button>`
        : html`<button class="plain" onClick=${() => setAsks(true)}>Delete…</button>`}
    </p>
    <p class="faint">
      They stay in this browser, prompts and answers included; the newest 1000 within 2 MB. Rank the models with${" "}
      <code>lora-fusion eval votes votes.jsonl</code>.
    </p>
  </section>`;
}

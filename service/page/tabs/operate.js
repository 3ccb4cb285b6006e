// Operate: what the engine holds, who waits, what of the limits is used; adapters, the policy, the audit.
import { signal } from "@preact/signals";
import { useEffect, useState } from "preact/hooks";
import { ApiError, ask, isAbort } from "../api.js";
import { html } from "../html.js";
import { usePoll } from "../poll.js";
import { caller, may } from "../store.js";
import { Adapters } from "./adapters.js";

const PERIOD_MS = 3000;
const PAUSE_MS = 250;
const AUDIT_ROWS = 25;
const WORDS = { requests: "requests a minute", tokens: "tokens a minute", builds: "builds a minute", concurrent: "requests at once" };

const state = signal(null);
const fault = signal("");

async function read() {
  try {
    state.value = await ask("v1/state");
    fault.value = "";
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    fault.value = error.message;
  }
  return !fault.value;
}

export function Operate() {
  usePoll(read, PERIOD_MS);
  return html`<h2>Operate</h2>
    ${fault.value && html`<p class="fault" role="alert">${fault} What follows is older.</p>`}
    ${state.value ? html`<${Engine} /><${Limits} />` : html`<p role="status">Loading…</p>`}
    <${Adapters} />
    <${Policy} />
    ${may("admin") && !caller.value.tenant && html`<${Audit} />`}`;
}

/** Seconds as people say them. */
export function ago(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  return seconds < 3600 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 360) / 10} h`;
}

function Engine() {
  const { slots, places, free, residents, queue } = state.value;
  const here = residents.filter((one) => ["warm", "draining"].includes(one.state));
  const coming = residents.filter((one) => !here.includes(one));
  const waits = queue.waiting
    ? `${queue.waiting} requests wait for a stack or build; the first was asked for ${ago(queue.oldest_s)} ago.`
    : "No request waits for a stack or build.";
  return html`<section aria-labelledby="engine">
    <h3 id="engine">In the engine</h3>
    <p>${places} places, ${slots} of them in one batch${free === null ? "" : `; ${free} free`}. ${waits}</p>
    ${free === null && html`<p class="faint">You see what only your tenant's requests can use.</p>`}
    <ul class="slots">
      ${here.map((one) => html`<${Place} key=${one.key} one=${one} />`)}
      ${Array.from({ length: free ?? 0 }, (_, index) => html`<li key=${index} class="free">free</li>`)}
    </ul>
    ${coming.length > 0 && html`<h4>On their way</h4>
    <ul class="slots">${coming.map((one) => html`<${Place} key=${one.key} one=${one} />`)}</ul>`}
  </section>`;
}

function Place({ one }) {
  const names = one.adapters.map((adapter) => adapter.names.join(", ") || `${adapter.digest.slice(0, 12)} (no name any more)`);
  const use = one.requests === 1 ? "1 request" : `${one.requests} requests`;
  const on = one.state === "warm" || one.state === "draining";
  const idle = one.requests ? use : `idle for ${ago(one.seconds)}`;
  const words = [one.kind, on ? idle : `${one.state} for ${ago(one.seconds)}, ${use} waiting`];
  if (one.rank) words.push(`rank ${one.rank}`);
  if (one.error) words.push(`error ${one.error.toPrecision(2)}`);
  if (one.state === "draining") words.push("goes when these end");
  if (one.in_batch) words.push("in the batch");
  if (one.evictable) words.push("makes way when needed");
  return html`<li class=${`${one.in_batch ? "batch" : ""} ${one.requests ? "busy" : ""}`}>
    <strong>${names.join(" + ") || one.key.slice(0, 12)}</strong><br />${words.join(" · ")}
  </li>`;
}

function Limits() {
  const { limits } = state.value;
  return html`<section aria-labelledby="limits">
    <h3 id="limits">Limits</h3>
    ${!limits.length && html`<p class="faint">No limit counts anything now.</p>`}
    ${limits.length > 0 && html`<div class="scroll" tabindex="0" role="group" aria-label="Limits in use"><table>
      <thead><tr><th scope="col">whose</th><th scope="col">what</th><th scope="col">used</th></tr></thead>
      <tbody>${limits.map((one) => {
        const whose = `${one.subject} ${one.name || "of the operator"}`;
        const text = `${one.used} of ${one.limit}`;
        return html`<tr key=${`${whose} ${one.kind}`}><th scope="row">${whose}</th><td>${WORDS[one.kind]}</td>
          <td><meter min="0" max=${one.limit} high=${0.9 * one.limit} value=${one.used} aria-label=${`${whose}, ${WORDS[one.kind]}`}></meter> ${text}</td></tr>`;
      })}</tbody>
    </table></div>`}
  </section>`;
}

function Policy() {
  const [text, setText] = useState("");
  const [found, setFound] = useState(null);
  useEffect(() => {
    const waiting = new AbortController();
    setFound(null);
    const timer = setTimeout(() => text.trim() && judge(text.trim(), waiting.signal, setFound), PAUSE_MS);
    return () => {
      clearTimeout(timer);
      waiting.abort();
    };
  }, [text]);
  const name = state.value?.policy.name;
  return html`<section aria-labelledby="policy">
    <h3 id="policy">Policy${name ? ` ${name}` : ""}</h3>
    <div class="form">
      <label>Would this recipe answer you?
        <input value=${text} onInput=${(event) => setText(event.target.value)} spellcheck="false" placeholder="0.6*task + 0.4*safety" />
      </label>
      <p role="status" class=${found?.kind ?? ""}>${found?.text ?? (text.trim() ? "…" : "")}</p>
    </div>
  </section>`;
}

async function judge(text, waiting, show) {
  try {
    const { policy, mode, rank, reason } = await ask("v1/fusions/plan", { body: { fusion: text }, signal: waiting });
    const served = `${mode}${rank ? `, rank ${rank}` : ""}${reason ? ` (${reason})` : ""}`;
    if (policy.allowed) show({ kind: "good", text: `Allowed; ${served}.` });
    else show({ kind: "fault", text: `Refused by the rule ${policy.rule}: ${policy.reason}` });
  } catch (error) {
    if (isAbort(error)) return;
    if (!(error instanceof ApiError)) throw error;
    show({ kind: "fault", text: error.message });
  }
}

function Audit() {
  const [rows, setRows] = useState(null);
  const [more, setMore] = useState(0);
  const [problem, setProblem] = useState("");
  const load = async (after = 0) => {
    try {
      const page = await ask(`v1/audit?order=desc&limit=${AUDIT_ROWS}${after ? `&after=${after}` : ""}`);
      setRows((known) => (after ? [...known, ...page.data] : page.data));
      setMore(page.has_more ? page.last_id : 0);
      setProblem("");
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      setProblem(error.message);
    }
  };
  useEffect(() => void load(), []);
  return html`<section aria-labelledby="audit">
    <h3 id="audit">Who changed what</h3>
    ${problem && html`<p class="fault" role="alert">${problem}</p>`}
    ${rows && !rows.length && html`<p class="faint">Nothing has been changed yet.</p>`}
    ${rows?.length > 0 && html`<div class="scroll" tabindex="0" role="group" aria-label="The audit"><table>
      <thead><tr><th scope="col">time</th><th scope="col">who</th><th scope="col">change</th><th scope="col">of</th></tr></thead>
      <tbody>${rows.map(({ id, entry }) => html`<tr key=${id}><td>${entry.time}</td><td>${who(entry.by)}</td><td>${entry.action}</td><td><code>${entry.target}</code></td></tr>`)}</tbody>
    </table></div>`}
    <p class="row"><button class="plain" onClick=${() => load()}>Read again</button>
    ${more ? html`<button class="plain" onClick=${() => load(more)}>Older ones</button>` : null}</p>
  </section>`;
}

function who(by) {
  const { key, role, tenant, address } = by ?? {};
  return [key || role || "the server", tenant && `of ${tenant}`, address && `from ${address}`].filter(Boolean).join(" ");
}

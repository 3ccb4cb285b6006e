// Adapters: those there are and those on their way; register one from files, a folder of the server, or a URL.
import { useRef, useState } from "preact/hooks";
import { ApiError, ask } from "../api.js";
import { html } from "../html.js";
import { loadAdapters } from "../load.js";
import { usePoll } from "../poll.js";
import { adapters, mayChange, notice } from "../store.js";

const PERIOD_MS = 2500;
const UPLOAD_MS = 600_000;
const MOST = 200;
const SELDOM = 6;
const MOVING = ["queued", "fetching", "registering"];
const SIZES = ["B", "KiB", "MiB", "GiB"];

function sizeText(bytes) {
  const power = Math.min(Math.floor(Math.log2(Math.max(bytes, 1)) / 10), SIZES.length - 1);
  return `${Math.round((bytes / 1024 ** power) * 10) / 10} ${SIZES[power]}`;
}

/** Read the adapters again: each time while one is fetched, else seldom. */
async function follow(turn) {
  const moves = adapters.peek().some((one) => MOVING.includes((one.fetch ?? one).state));
  if (!moves && turn % SELDOM) return true;
  try {
    await loadAdapters();
    return true;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    return false; // what the engine's state says of it stands above
  }
}

export function Adapters() {
  const [fault, setFault] = useState("");
  const [filter, setFilter] = useState("");
  const act = async (work) => {
    try {
      const done = await work();
      await loadAdapters();
      setFault("");
      notice.value = done;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      setFault(error.message);
    }
  };
  const turns = useRef(0);
  usePoll(() => follow(turns.current++), PERIOD_MS);
  const found = adapters.value.filter((one) => one.name.includes(filter.trim()));
  return html`<section aria-labelledby="adapters">
    <h3 id="adapters">Adapters</h3>
    ${fault && html`<p class="fault" role="alert">${fault}</p>`}
    ${adapters.value.length > 10 && html`<label>Those whose name has <input value=${filter} onInput=${(event) => setFilter(event.target.value)} /></label>`}
    <div class="scroll" tabindex="0" role="group" aria-label="Adapters"><table>
      <thead><tr><th scope="col">name</th><th scope="col">rank</th><th scope="col">modules</th><th scope="col">size</th><th scope="col">profiles</th><th scope="col">state</th><th scope="col"><span class="unseen">remove</span></th></tr></thead>
      <tbody>${found.slice(0, MOST).map((one) => html`<${Row} key=${one.name} one=${one} act=${act} />`)}</tbody>
    </table></div>
    ${found.length > MOST && html`<p class="faint">The first ${MOST} of ${found.length}; type a part of a name.</p>`}
    <${Upload} act=${act} />
    <${Source} act=${act} />
  </section>`;
}

function Row({ one, act }) {
  const [asks, setAsks] = useState(false);
  const isThere = one.digest !== undefined;
  const fetch = isThere ? one.fetch : one.source && one;
  const what = isThere || !one.source ? "Remove" : one.state === "failed" ? "Forget" : "Cancel";
  const remove = () => {
    setAsks(false);
    act(async () => {
      await ask(`v1/adapters/${one.name.split("/").map(encodeURIComponent).join("/")}`, { method: "DELETE" });
      return `${one.name} is gone`;
    });
  };
  return html`<tr>
    <th scope="row">${one.name}</th><td>${one.rank}</td><td>${one.modules}</td><td>${isThere && sizeText(one.bytes)}</td>
    <td>${(one.profiles ?? []).join(", ")}</td>
    <td>${one.state === "damaged" ? html`<span class="fault">damaged: ${one.reason}</span>` : isThere && (one.gate ? "a gate" : "ready")}
      ${fetch && html`<${Fetch} one=${fetch} />`}</td>
    <td>${mayChange(one) && (asks
      ? html`<span class="row"><button onClick=${remove}>${what} ${one.name}</button><button class="plain" onClick=${() => setAsks(false)}>Keep</button></span>`
      : html`<button class="plain" aria-label=${`${what} ${one.name}…`} onClick=${() => setAsks(true)}>${what}…</button>`)}${one.public && html`<span class="faint">public</span>`}</td>
  </tr>`;
}

function Fetch({ one }) {
  const { state, reason, bytes = 0, total_bytes: total, bytes_per_s: speed, eta_s: eta, source } = one;
  if (state === "failed") return html`<span class="fault">not fetched: ${reason}</span>`;
  const parts = [state, bytes && `${sizeText(bytes)}${total ? ` of ${sizeText(total)}` : ""}`, speed && `${sizeText(speed)}/s`, eta && `${Math.ceil(eta)} s left`];
  return html`<span>${parts.filter(Boolean).join(", ")}
    <progress max=${total ?? 1} value=${total ? bytes : undefined} aria-label=${`Fetch from ${source}`}></progress></span>`;
}

/** The parts of an upload: a .tar of the folder, or its two files; a sentence when they are neither. */
function readFiles(files) {
  const [tar] = files.filter((file) => file.name.endsWith(".tar"));
  if (tar && files.length === 1) return { parts: [["file", tar]], stem: tar.name.slice(0, -4) };
  const weights = files.find((file) => file.name.endsWith(".safetensors"));
  const config = files.find((file) => file.name === "adapter_config.json");
  if (weights && config) return { parts: [["weights", weights], ["config", config]], stem: "" };
  return { fault: "Choose one .tar, or both adapter_config.json and adapter_model.safetensors." };
}

function Upload({ act }) {
  const [over, setOver] = useState(false);
  const [chosen, setChosen] = useState(null);
  const [busy, setBusy] = useState(false);
  const name = useRef();
  const take = (list) => {
    const found = readFiles([...list]);
    setChosen(found);
    if (found.stem && !name.current.value) name.current.value = found.stem;
  };
  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    take(event.dataTransfer.files);
  };
  const send = async (event) => {
    event.preventDefault();
    const body = new FormData();
    const text = name.current.value.trim();
    body.set("name", text);
    for (const [part, file] of chosen.parts) body.set(part, file);
    setBusy(true);
    await act(async () => {
      await ask("v1/adapters", { body, headers: { "x-fusion-upload": "1" }, limit: UPLOAD_MS });
      setChosen(null);
      name.current.value = "";
      return `${text} is registered`;
    });
    setBusy(false);
  };
  return html`<form
    class=${`drop ${over ? "over" : ""}`}
    aria-label="Upload an adapter"
    onSubmit=${send}
    onDragOver=${(event) => {
      event.preventDefault();
      setOver(true);
    }}
    onDragLeave=${() => setOver(false)}
    onDrop=${drop}
  >
    <p>Drop a .tar of an adapter's folder here, or its adapter_config.json and adapter_model.safetensors together.</p>
    <div class="row">
      <label>Files <input type="file" multiple accept=".tar,.json,.safetensors" onChange=${(event) => take(event.target.files)} /></label>
      <label>Name <input ref=${name} required autocomplete="off" spellcheck="false" /></label>
      <button disabled=${busy || !chosen?.parts}>${busy ? "Uploading…" : "Upload"}</button>
    </div>
    <p role="status" class=${chosen?.fault ? "fault" : ""}>
      ${chosen?.fault ?? (chosen?.parts && chosen.parts.map(([, file]) => `${file.name}, ${sizeText(file.size)}`).join("; "))}
    </p>
  </form>`;
}

function Source({ act }) {
  const [name, source] = [useRef(), useRef()];
  const send = (event) => {
    event.preventDefault();
    const body = { name: name.current.value.trim(), source: source.current.value.trim() };
    act(async () => {
      await ask("v1/adapters", { body });
      name.current.value = source.current.value = "";
      return `${body.name} is registered, or on its way`;
    });
  };
  return html`<form class="row" aria-label="Register an adapter from a source" onSubmit=${send}>
    <label>Folder of the server, or URL <input ref=${source} required spellcheck="false" placeholder="hf://owner/name@main" /></label>
    <label>Name <input ref=${name} required autocomplete="off" spellcheck="false" /></label>
    <button>Register</button>
  </form>`;
}

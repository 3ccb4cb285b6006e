// The page's frame: who asks, whether the server answers, and the tabs. Each tab is one component of one module.
import { render } from "preact";
import { useRef } from "preact/hooks";
import { html } from "./html.js";
import { connect } from "./load.js";
import { link, route } from "./route.js";
import { caller, key, may, notice, server } from "./store.js";
import { Mix } from "./tabs/mix.js";
import { Evidence } from "./tabs/evidence.js";
import { Operate } from "./tabs/operate.js";
import { Vote } from "./tabs/vote.js";

const TABS = [
  { id: "mix", name: "Mix", view: Mix, role: "user" },
  { id: "evidence", name: "Evidence", view: Evidence, role: "user" },
  { id: "vote", name: "Blind vote", view: Vote, role: "user" },
  { id: "operate", name: "Operate", view: Operate, role: "deployer" },
];

function KeyForm() {
  const field = useRef();
  const enter = (event) => {
    event.preventDefault();
    key.value = field.current.value.trim();
    connect();
  };
  return html`<form class="card key" onSubmit=${enter}>
    <label for="key">API key</label>
    <p id="key-hint">This server answers with a key alone. It stays in this tab and is sent to no other server.</p>
    <input id="key" ref=${field} type="password" autocomplete="off" spellcheck="false" required aria-describedby="key-hint" />
    <button>Use this key</button>
    ${key.value && html`<p class="fault" role="alert">${server.value.reason}</p>`}
  </form>`;
}

function Visitor() {
  const { keys, key: id, role, tenant } = caller.value;
  if (!keys) return html`<p class="visitor">no keys: everybody is an admin</p>`;
  const forget = () => {
    key.value = "";
    connect();
  };
  return html`<p class="visitor">
    ${role}${tenant && ` of ${tenant}`} · <code>${id}</code> <button class="plain" onClick=${forget}>Forget the key</button>
  </p>`;
}

function Tabs({ tabs, current }) {
  const turn = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = tabs[(tabs.indexOf(current) + step + tabs.length) % tabs.length];
    location.hash = link(next.id);
    document.getElementById(`tab-${next.id}`).focus();
  };
  return html`<div class="tabs" role="tablist" aria-label="Parts of the page" onKeyDown=${turn}>
    ${tabs.map(
      (tab) => html`<a
        role="tab"
        key=${tab.id}
        id=${`tab-${tab.id}`}
        href=${link(tab.id)}
        aria-selected=${tab === current}
        aria-controls="panel"
        tabindex=${tab === current ? 0 : -1}
        >${tab.name}</a
      >`,
    )}
  </div>`;
}

function Panel() {
  const { state, reason } = server.value;
  if (state === "locked") return html`<main><${KeyForm} /></main>`;
  if (state !== "ready") {
    const text = state === "starting" ? `Waiting for the server. ${reason}` : reason;
    return html`<main class="wait"><p role="status">${text || "Loading…"}</p></main>`;
  }
  const tabs = TABS.filter((tab) => may(tab.role));
  const current = tabs.find((tab) => tab.id === route.value.tab) ?? tabs[0];
  return html`<${Tabs} tabs=${tabs} current=${current} />
    <main id="panel" role="tabpanel" aria-labelledby=${`tab-${current.id}`} tabindex="-1"><${current.view} /></main>`;
}

function App() {
  return html`<header class="top">
      <h1>LoRA Fusion</h1>
      ${caller.value && html`<p class="base">on <code>${caller.value.base}</code></p><${Visitor} />`}
    </header>
    <${Panel} />
    <footer class="foot">
      <a href="docs">The API</a>
      <p class="unseen" role="status">${notice}</p>
    </footer>`;
}

document.getElementById("app").replaceChildren();
render(html`<${App} />`, document.getElementById("app"));
connect();

// Which panes there are, what each asked for, and whether what answered is what was asked for.
import { computed, effect, signal } from "@preact/signals";
import { digests, isMixed, mix, recipe } from "../mixer.js";
import { activeTerms } from "../recipe.js";
import { adapters, profiles } from "../store.js";
import { follow, makeBody, scoreTokens } from "./answer.js";

const LIVE_MS = 60;

export const prompt = signal("");
export const system = signal("");
export const temperature = signal(0);
export const maxTokens = signal(64);
/** Whether the mix answers again whenever it changes, and whether tokens are scored under the base. */
export const isLive = signal(true);
export const isScored = signal(false);
/** Names of profiles that have a pane. */
export const shown = signal([]);
/** Pane id → its answer. */
export const answers = signal({});

/** The panes, in order: id, title, target of the request, and the digest that its answer must have (null: unknown). */
export const panes = computed(() => {
  const cards = new Map(adapters.value.map((card) => [card.name, card]));
  const names = activeTerms(mix.value).map(({ name }) => name);
  const saved = profiles.value.filter(({ name }) => shown.value.includes(name));
  return [
    { id: "base", title: "Base", target: {}, digest: "" },
    ...(recipe.value.trim() ? [{ id: "mix", title: "Mix", target: {} }] : []),
    ...names.map((name) => ({ id: `adapter ${name}`, title: `${name} alone`, target: { model: name }, digest: cards.get(name)?.fusion_digest ?? null })),
    ...saved.map(({ name, version, digest }) => ({ id: `profile ${name}`, title: `Profile ${name}@${version}`, target: { model: name }, digest })),
  ];
});

const running = new Map();

function show(id, change) {
  answers.value = { ...answers.value, [id]: { ...answers.value[id], ...change } };
}

/** Ask one pane; what it asked before is ended. */
export async function askPane(pane, text = prompt.value) {
  running.get(pane.id)?.abort();
  const ender = new AbortController();
  running.set(pane.id, ender);
  const asked = pane.id === "mix" ? recipe.value.trim() : pane.title;
  const target = pane.id === "mix" ? { fusion: asked } : pane.target;
  const settings = { system: system.value, temperature: temperature.value, maxTokens: maxTokens.value };
  const update = (answer) => !ender.signal.aborted && show(pane.id, answer);
  answers.value = { ...answers.value, [pane.id]: { asked, digest: pane.digest, text: "" } };
  await follow(makeBody(target, settings, text), { scored: isScored.value, signal: ender.signal, update });
  const answer = answers.value[pane.id];
  if (ender.signal.aborted || !answer.done || !isScored.value || !answer.promptIds) return;
  if (pane.id !== "base") update({ scores: await scoreTokens(answer, ender.signal).catch(() => null) });
}

/** Ask all panes at once: the requests run in one batch. */
export function askAll() {
  return Promise.all(panes.value.map((pane) => askPane(pane)));
}

/** End all that is running. */
export function stop() {
  for (const ender of running.values()) ender.abort();
  const ended = Object.entries(answers.value).map(([id, answer]) => [id, { ...answer, done: true }]);
  answers.value = Object.fromEntries(ended);
}

/** What is wrong with an answer's origin, in words; empty when it is what was asked for, or when that is not known. */
export function findMismatch(id, answer) {
  if (!answer.fusion) return "";
  const wanted = id === "mix" ? digests.get(answer.asked) : answer.digest;
  const { digest = "", recipe: said } = answer.fusion;
  if (wanted == null || wanted === digest) return "";
  const source = digest ? `${said ?? "another fusion"} (${digest.slice(0, 12)})` : "the base";
  return `Asked for ${answer.asked}${wanted ? ` (${wanted.slice(0, 12)})` : ""}, but the answer says it came from ${source}.`;
}

// The mix answers again when it changes: at once where that builds nothing, else never by itself.
let timer;
let last = 0;
effect(() => {
  const text = recipe.value.trim();
  const isFree = isMixed();
  clearTimeout(timer);
  const asked = answers.peek().mix?.asked;
  if (!isLive.peek() || asked === undefined || asked === text || !isFree) return;
  const again = () => {
    last = performance.now();
    const pane = panes.peek().find(({ id }) => id === "mix");
    if (pane) askPane(pane);
  };
  timer = setTimeout(again, Math.max(0, last + LIVE_MS - performance.now()));
});

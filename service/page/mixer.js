// The mix: sliders' state and recipe text, each from the other, and the server's verdict on it.
import { effect, signal } from "@preact/signals";
import { ApiError, ask, isAbort } from "./api.js";
import { EMPTY, shapeOf, toText } from "./recipe.js";
import { note, route } from "./route.js";
import { server } from "./store.js";

const PAUSE_MS = 200;

/** What the sliders show: a recipe's JSON form (see recipe.js). */
export const mix = signal(EMPTY);
/** What the text box shows. */
export const recipe = signal("");
/** The server's word on the text: `plan` (of /v1/fusions/plan), or `fault`, its message; both null while it is asked. */
export const verdict = signal({ plan: null, fault: null });
/** Recipe text → digest of the fusion that the server plans for it: what answers to it must have. */
export const digests = new Map();
/** Whether the sliders show what the text says: not while the server parses a new one. */
export const isRead = signal(true);
const mixedShapes = new Set();

/** Whether the server mixes what the text says, as far as that is known: then asking builds nothing. */
export function isMixed() {
  const isShown = recipe.value === toText(mix.value); // else the sliders show another, or none
  return (isShown && mixedShapes.has(shapeOf(mix.value))) || verdict.value.plan?.mode === "mixed";
}

/** Change the mix; the text follows at once. */
export function setMix(next) {
  if (!isRead.value) return;
  mix.value = next;
  recipe.value = toText(next);
  judge(false);
}

/** Take another recipe; the sliders follow when the server has parsed it. */
export function setRecipe(text) {
  recipe.value = text;
  judge(true);
}

/** Change one term of the mix. */
export function setTerm(name, change) {
  const adapters = mix.value.adapters.map((term) => (term.name === name ? { ...term, ...change } : term));
  setMix({ ...mix.value, adapters });
}

/** The mix with another weight of a term; a name that it has not is added, and null takes a term out. */
export function setWeight(name, weight) {
  const { adapters } = mix.value;
  const known = adapters.some((term) => term.name === name);
  const changed = known
    ? adapters.map((term) => (term.name === name ? { ...term, weight } : term)).filter((term) => term.weight !== null)
    : [...adapters, { name, weight }];
  setMix({ ...mix.value, adapters: changed });
}

let asked = new AbortController();

/** Have the server look at the text, once nothing has changed for a moment. Nothing is built for that. */
async function judge(fill) {
  asked.abort();
  asked = new AbortController();
  const { signal } = asked;
  const text = recipe.value.trim();
  verdict.value = { plan: null, fault: null };
  isRead.value = !fill || !text;
  if (!text) {
    if (fill) mix.value = EMPTY;
    return;
  }
  await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
  if (signal.aborted) return;
  try {
    const plan = await ask("v1/fusions/plan", { body: { fusion: text }, signal });
    if (fill) mix.value = plan.fusion;
    digests.set(text, plan.digest);
    if (plan.mode === "mixed") mixedShapes.add(shapeOf(mix.value));
    isRead.value = true;
    verdict.value = { plan, fault: null };
  } catch (error) {
    if (isAbort(error)) return;
    if (!(error instanceof ApiError)) throw error;
    verdict.value = { plan: null, fault: error.message };
  }
  isRead.value = true;
}

// A link with a recipe sets the sliders, and the address follows them.
effect(() => {
  const { tab, params } = route.value;
  const isReady = server.value.state === "ready";
  if (isReady && ["", "mix"].includes(tab) && params.recipe && params.recipe !== recipe.peek()) setRecipe(params.recipe);
});
effect(() => {
  const text = recipe.value;
  const { tab, params } = route.peek();
  if (text && ["", "mix"].includes(tab) && params.recipe !== text) note("mix", { ...params, recipe: text });
});

// What the page knows: the visitor's key, what it may do, what the server has. Signals, which redraw what reads them.
import { computed, effect, signal } from "@preact/signals";

const KEY = "fusion-key";
const ROLES = ["user", "deployer", "admin"];

/** The API key. It stays in this tab's session and is sent to this server alone. */
export const key = signal(sessionStorage.getItem(KEY) ?? "");
effect(() => (key.value ? sessionStorage.setItem(KEY, key.value) : sessionStorage.removeItem(KEY)));

/** `starting` (not answering yet), `locked` (a key is needed), `failed`, or `ready`; and why. */
export const server = signal({ state: "starting", reason: "" });
/** The answer of /v1/whoami: role, tenant, base, limits; null before. */
export const caller = signal(null);
/** Cards of /v1/adapters, those that are being fetched included. */
export const adapters = signal([]);
/** Cards of /v1/fusions: profiles in their current version. */
export const profiles = signal([]);
/** Fusion digest → its scorecards, of those that have any. */
export const scorecards = signal(new Map());
/** What a screen reader is told next. */
export const notice = signal("");

export const gates = computed(() => adapters.value.filter((adapter) => adapter.gate && !adapter.state));
/** Adapters that a recipe can name as a term. */
export const terms = computed(() => adapters.value.filter((adapter) => adapter.digest && !adapter.gate));

/** Whether the visitor's key has `role`, or one above it. */
export function may(role) {
  return ROLES.indexOf(caller.value?.role) >= ROLES.indexOf(role);
}

/** Whether the visitor's key may change the adapter or profile of this card. */
export function mayChange(card) {
  return may("deployer") && !card.public;
}

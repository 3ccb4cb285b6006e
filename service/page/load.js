// Fills the store from the API: who asks, then what there is.
import { ApiError, ask, list } from "./api.js";
import { adapters, caller, profiles, scorecards, server } from "./store.js";

const RETRY_MS = 2000;

/** Find out whether the server answers this visitor, and read what it has; again, while it starts. */
export async function connect() {
  try {
    caller.value = await ask("v1/whoami");
    await Promise.all([loadAdapters(), loadProfiles(), loadScorecards()]);
    server.value = { state: "ready", reason: "" };
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    caller.value = null;
    // 429 comes after many wrong keys: the right one is taken all the same.
    const state = [401, 429].includes(error.status) ? "locked" : error.status === 503 || error.status === 0 ? "starting" : "failed";
    server.value = { state, reason: error.message };
    if (state === "starting") setTimeout(connect, RETRY_MS);
  }
}

export async function loadAdapters() {
  adapters.value = await list("v1/adapters");
}

export async function loadProfiles() {
  profiles.value = await list("v1/fusions");
}

export async function loadScorecards() {
  const found = new Map();
  for (const { digest, scorecard } of await list("v1/evidence", { most: 2000 })) {
    found.set(digest, [...(found.get(digest) ?? []), scorecard]);
  }
  scorecards.value = found;
}

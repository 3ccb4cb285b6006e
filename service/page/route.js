// Where the page is: `#tab?name=value`. The fragment never reaches the server.
import { signal } from "@preact/signals";

/** The tab, and what the fragment says for it. */
export const route = signal(read());
addEventListener("hashchange", () => (route.value = read()));

function read() {
  const [tab, query = ""] = location.hash.slice(1).split("?");
  return { tab, params: Object.fromEntries(new URLSearchParams(query)) };
}

/** The fragment of a tab with what it shows. */
export function link(tab, params = {}) {
  const query = new URLSearchParams(Object.entries(params).filter(([, value]) => value)).toString();
  return `#${tab}${query && `?${query}`}`;
}

/** Go there, as a link does. */
export function go(tab, params) {
  location.hash = link(tab, params);
}

/** Say in the address what the tab shows, without a step in the history. */
export function note(tab, params) {
  history.replaceState(null, "", link(tab, params));
  route.value = { tab, params };
}

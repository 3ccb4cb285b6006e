// Votes on blind comparisons, in this browser alone: the newest of them, within bounds, and as JSONL.
import { signal } from "@preact/signals";

const PLACE = "fusion-votes";
const MOST = 1000;
const MOST_CHARACTERS = 2_000_000;

/** All votes, oldest first, and why they could not be kept beyond this tab; empty when they are. */
export const votes = signal(read());
export const unkept = signal("");

function read() {
  try {
    const found = JSON.parse(localStorage.getItem(PLACE) ?? "[]");
    return Array.isArray(found) ? found : [];
  } catch {
    return []; // another program's, or no storage
  }
}

function keep() {
  try {
    localStorage.setItem(PLACE, JSON.stringify(votes.value));
    unkept.value = "";
  } catch (error) {
    unkept.value = `They are kept in this tab alone: ${error.message}`;
  }
}

/** Add a vote; returns how many of the oldest had to go for it. */
export function addVote(vote) {
  const all = [...votes.value, vote];
  let from = Math.max(0, all.length - MOST);
  let size = all.slice(from).reduce((sum, one) => sum + JSON.stringify(one).length, 0);
  while (size > MOST_CHARACTERS && from < all.length - 1) size -= JSON.stringify(all[from++]).length;
  votes.value = all.slice(from);
  keep();
  return from;
}

export function clearVotes() {
  votes.value = [];
  localStorage.removeItem(PLACE);
  unkept.value = "";
}

/** One vote a line, as `lora-fusion eval votes` reads them. */
export function toLines() {
  return votes.value.map((vote) => `${JSON.stringify(vote)}\n`).join("");
}

/** Wins, losses and ties of each model, most wins first. */
export function tally() {
  const counts = new Map();
  const count = (pane, point) => {
    const id = pane.digest ?? pane.model;
    const known = counts.get(id) ?? { label: pane.recipe ?? pane.model, wins: 0, losses: 0, ties: 0 };
    known[point] += 1;
    counts.set(id, known);
  };
  for (const { a, b, choice } of votes.value) {
    count(a, { a: "wins", b: "losses", tie: "ties" }[choice]);
    count(b, { a: "losses", b: "wins", tie: "ties" }[choice]);
  }
  return [...counts.values()].sort((one, other) => other.wins - one.wins);
}

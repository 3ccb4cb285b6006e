// What scorecards say: measures with intervals, the front of the best points, and the lines along which weights vary.

/** Which prompts a figure is of: those that no weight was chosen on, or all. */
export const HALVES = { report: "the half that chose nothing", all: "all prompts" };

/** A measure of a card as {value, low, high, total}; null where it was not taken. Cards may hold plain numbers. */
export function readMeasure(card, name) {
  const found = card?.[name];
  const value = typeof found === "number" ? found : found?.value;
  if (!Number.isFinite(value)) return null;
  const { low = value, high = value, total = null } = typeof found === "object" ? found : {};
  return { value, low, high, total };
}

/** The newest card of each fusion with a recipe, of the half that is asked for, or of all prompts where it has none. */
export function readPoints(entries, half) {
  const points = new Map();
  for (const { digest, recipe, fusion, current, created, key, scorecard } of entries) {
    if (recipe === null || points.has(digest)) continue;
    const part = half === "report" ? scorecard.half_report : null;
    const card = part ?? scorecard;
    const measures = Object.fromEntries(MEASURES.map((name) => [name, readMeasure(card, name)]));
    const hasPair = measures.harm && measures.safe_answered;
    const of = part ? "report" : "all";
    points.set(digest, { digest, recipe, fusion, current, created, key, of, measures, hasPair });
  }
  return [...points.values()];
}

export const MEASURES = [
  ...["harm", "refused", "degenerate_harm", "safe_answered", "over_refusal", "degenerate", "task", "mmlu"],
];
export const NAMES = {
  harm: "harmful prompts answered",
  refused: "harmful prompts refused",
  degenerate_harm: "harmful prompts: degenerate answers",
  safe_answered: "harmless prompts answered",
  over_refusal: "harmless prompts refused",
  degenerate: "harmless prompts: degenerate answers",
  task: "task exact",
  mmlu: "MMLU",
};

/** Digests of the points that no other is better than: less harm, or more use, and the other not worse. */
export function findFront(points) {
  const seen = points.filter((point) => point.hasPair);
  const isBeaten = (one) =>
    seen.some((other) => {
      const harm = other.measures.harm.value - one.measures.harm.value;
      const use = other.measures.safe_answered.value - one.measures.safe_answered.value;
      return harm <= 0 && use >= 0 && (harm < 0 || use > 0);
    });
  return new Set(seen.filter((point) => !isBeaten(point)).map((point) => point.digest));
}

/** The weights of a plain sum by adapter; null for other recipes. */
export function readWeights(fusion) {
  if (!fusion || fusion.method !== "sum" || fusion.answer || fusion.gate) return null;
  const terms = fusion.adapters.map(({ name, weight }) => [name, weight]);
  return terms.every(([, weight]) => typeof weight === "number") ? Object.fromEntries(terms) : null;
}

/** The lines on which two adapters' weights vary, one along the other: those with three points or more, longest first.
 *
 * Each has `title`, the adapter `along` whose weight is λ, and `members`, [{x, point}] by λ.
 */
export function findLines(points) {
  const lines = new Map();
  const add = (title, along, x, point) => {
    const line = lines.get(`${title} ${along}`) ?? { title, along, members: [] };
    lines.set(`${title} ${along}`, line);
    if (!line.members.some((member) => member.x === x)) line.members.push({ x, point });
  };
  const weighed = points.map((point) => [point, readWeights(point.fusion)]).filter(([, weights]) => weights);
  const pairs = new Set(weighed.map(([, weights]) => Object.keys(weights).sort()).filter((names) => names.length === 2).map((names) => names.join("\n")));
  for (const pair of pairs) {
    const [a, b] = pair.split("\n");
    for (const [point, weights] of weighed) {
      if (Object.keys(weights).some((name) => name !== a && name !== b)) continue;
      const [wa, wb] = [weights[a] ?? 0, weights[b] ?? 0];
      const along = guard(a) && !guard(b) ? a : b;
      add(`${a} + ${b} = ${round(wa + wb)}`, along, along === a ? wa : wb, point);
      add(`${round(wa)}*${a} + λ*${b}`, b, wb, point);
      add(`λ*${a} + ${round(wb)}*${b}`, a, wa, point);
    }
  }
  const long = [...lines.values()].filter((line) => line.members.length > 2);
  for (const line of long) line.members.sort((one, other) => one.x - other.x);
  return long.sort((one, other) => other.members.length - one.members.length || one.title.localeCompare(other.title));
}

/** Whether an adapter's name says that it is the one which makes safe: its weight is λ. */
function guard(name) {
  return /safe|refus|guard|harm/i.test(name);
}

export function round(number) {
  return Number(number.toFixed(4)) + 0;
}

export function percent(share) {
  return `${Math.round(100 * share)} %`;
}

/** A share with its interval, in words: `12 % (8–17)`. */
export function shareText(measure) {
  if (!measure) return "";
  const { value, low, high } = measure;
  return low === high ? percent(value) : `${percent(value)} (${Math.round(100 * low)}–${Math.round(100 * high)})`;
}

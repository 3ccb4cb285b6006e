// A mix as the page holds it, and as text or JSON. Text is parsed by the server alone (POST /v1/fusions/plan).
//
// A mix is a recipe's JSON form: {adapters: [{name, weight}], method, …options, answer, gate: {by, bounds}}, with
// `muted` in the terms that are left out of it for now, and `solo`, the name of the one that is heard alone.

const PLAIN = /^[A-Za-z][A-Za-z0-9._-]{0,63}$/;
const OWN = ["adapters", "method", "answer", "gate", "solo"];

/** A number as the recipe's grammar has it: no exponent, no noise of binary fractions. */
export function numberText(number) {
  return String(Number(number.toFixed(6)) + 0);
}

export function nameText(name) {
  return PLAIN.test(name) ? name : `\`${name}\``;
}

/** Which function a weight is: number, ramp, steps, fade, components or modules. */
export function kindOf(weight) {
  if (typeof weight === "number") return "number";
  return ["ramp", "steps", "fade", "components"].find((kind) => Array.isArray(weight[kind])) ?? "modules";
}

export function weightText(weight) {
  const kind = kindOf(weight);
  const numbers = kind === "number" ? [weight] : weight[kind];
  switch (kind) {
    case "number":
      return numberText(weight);
    case "ramp":
      return `ramp(${numbers.map(numberText).join("..")})`;
    case "fade":
      return `fade(${numberText(numbers[0])}..${numberText(numbers[1])}, ${numbers[2]})`;
    case "steps":
      return `steps(${numbers.map(([start, level]) => `${start}: ${weightText(level)}`).join(", ")})`;
    case "components":
      return `[${numbers.map(numberText).join(", ")}]`;
    default:
      return `{${Object.entries(weight).map(([pattern, level]) => `${pattern}: ${weightText(level)}`).join(", ")}}`;
  }
}

function optionText(value) {
  if (typeof value === "number") return numberText(value);
  return typeof value === "string" ? nameText(value) : String(value);
}

/** The terms that count: the one heard alone, or those not muted. */
export function activeTerms(mix) {
  return mix.adapters.filter((term) => (mix.solo ? term.name === mix.solo : !term.muted));
}

/** The recipe's text; empty for a mix without terms. */
export function toText(mix) {
  const terms = activeTerms(mix);
  if (!terms.length) return "";
  let text = terms.map(({ name, weight }) => `${weightText(weight)}*${nameText(name)}`).join(" + ");
  const options = Object.entries(mix).filter(([name]) => !OWN.includes(name));
  if (mix.method !== "sum") {
    text = `${mix.method}(${[text, ...options.map(([name, value]) => `${name}=${optionText(value)}`)].join(", ")})`;
  }
  if (mix.answer) text = `answer(${text})`;
  const bounds = Object.entries(mix.gate?.bounds ?? {}).filter(([name]) => terms.some((term) => term.name === name));
  if (!bounds.length) return text;
  const spans = bounds.map(([name, [low, high]]) => `${nameText(name)} in ${numberText(low)}..${numberText(high)}`);
  return `gate(${[text, `by=${nameText(mix.gate.by)}`, ...spans].join(", ")})`;
}

/** The recipe's JSON form, as `fusion` in a request. */
export function toJson(mix) {
  const { answer, gate, solo, ...rest } = mix;
  const terms = activeTerms(mix);
  const bounds = Object.entries(gate?.bounds ?? {}).filter(([name]) => terms.some((term) => term.name === name));
  return {
    ...rest,
    adapters: terms.map(({ name, weight }) => ({ name, weight })),
    ...(answer ? { answer } : {}),
    ...(bounds.length ? { gate: { by: gate.by, bounds: Object.fromEntries(bounds) } } : {}),
  };
}

/** What a mix is but for its numbers: mixes of one shape are served alike. */
export function shapeOf(mix) {
  const { adapters, gate, ...rest } = toJson(mix);
  return JSON.stringify([adapters.map(({ name, weight }) => [name, kindOf(weight)]).sort(), gate?.by, rest]);
}

/** The first number of a weight: where a slider starts that takes its place. */
export function firstNumber(weight) {
  const kind = kindOf(weight);
  if (kind === "number") return weight;
  const first = kind === "modules" ? Object.values(weight)[0] : weight[kind][0];
  return typeof first === "number" ? first : firstNumber(Array.isArray(first) ? first[1] : first);
}

export const EMPTY = { adapters: [], method: "sum" };

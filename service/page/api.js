// Requests to the server that served the page: the visitor's key, errors in the server's own words, answers as streams.
import { key } from "./store.js";

const WAIT_MS = 60_000;
const ANSWER_MS = 600_000;

/** What the server says is wrong: `message`, HTTP `status`, and the key of the request that is at fault, `param`. */
export class ApiError extends Error {
  constructor(status, message, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/** The address of a path of the API, also where a proxy serves the page below another path. */
export function address(path) {
  return new URL(path.replace(/^\//, ""), new URL(".", location.href.split("#")[0]));
}

/** Whether an error only says that nobody waits for the answer any longer. */
export function isAbort(error) {
  return error?.name === "AbortError";
}

/** A response with status 2xx; ApiError for others, and where the server does not answer within `limit` ms. */
export async function send(path, { method, body, headers = {}, signal, limit = WAIT_MS } = {}) {
  const waits = [AbortSignal.timeout(limit), ...(signal ? [signal] : [])];
  const all = { ...headers };
  if (key.value) all.authorization = `Bearer ${key.value}`;
  const isJson = body !== undefined && !(body instanceof Blob) && !(body instanceof FormData);
  if (isJson) all["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(address(path), {
      method: method ?? (body === undefined ? "GET" : "POST"),
      headers: all,
      body: isJson ? JSON.stringify(body) : body,
      signal: AbortSignal.any(waits),
      credentials: "omit",
      cache: "no-store",
      redirect: "error",
    });
  } catch (error) {
    if (isAbort(error)) throw error;
    const late = error.name === "TimeoutError";
    throw new ApiError(0, late ? `The server did not answer within ${limit / 1000} s.` : "The server cannot be reached.");
  }
  if (response.ok) return response;
  throw await readError(response);
}

async function readError(response) {
  const text = await response.text().catch(() => "");
  try {
    const { message, param } = JSON.parse(text).error;
    return new ApiError(response.status, message, param);
  } catch {
    return new ApiError(response.status, `The server answered ${response.status}: ${text.slice(0, 200)}`);
  }
}

/** The JSON of an answer, null for none. */
export async function ask(path, options) {
  const text = await (await send(path, options)).text();
  return text ? JSON.parse(text) : null;
}

/** All entries of a list that comes in parts. */
export async function list(path, { signal, most = 5000 } = {}) {
  const entries = [];
  for (let after = ""; entries.length < most; ) {
    const part = await ask(`${path}${path.includes("?") ? "&" : "?"}limit=1000${after && `&after=${encodeURIComponent(after)}`}`, { signal });
    entries.push(...part.data);
    if (!part.has_more || !part.last_id) break;
    after = part.last_id;
  }
  return entries;
}

/** A streamed answer: its response, whose headers say what answers, and its events as an async iterable of JSON. */
export async function stream(path, body, signal) {
  const response = await send(path, { body: { ...body, stream: true }, signal, limit: ANSWER_MS });
  return { headers: response.headers, events: readEvents(response) };
}

/** The JSON values of an event stream, until `[DONE]` or its end; ApiError for an error within. */
export async function* readEvents(response) {
  let rest = "";
  for await (const part of readText(response.body)) {
    const lines = (rest + part).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.code ?? 500, event.error.message);
      yield event;
    }
  }
}

async function* readText(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** What an answer's headers say of the fusion behind it; empty for the plain base. */
export function readFusion(headers) {
  const fusion = {};
  for (const name of ["digest", "mode", "source", "rank", "error", "recipe", "stack", "weights", "gate"]) {
    const value = headers.get(`x-fusion-${name}`);
    if (value !== null) fusion[name] = name === "recipe" ? decodeURIComponent(value) : value;
  }
  if (fusion.weights) fusion.weights = JSON.parse(fusion.weights);
  return fusion;
}

// One answer to one prompt: streamed, with what the answer itself says of what computed it and how long that took.
import { ApiError, ask, isAbort, readFusion, stream } from "../api.js";
import { caller } from "../store.js";

/** The body of a chat request with the bench's settings; `target` is `model` alone, or `fusion` beside the base. */
export function makeBody(target, { system, temperature, maxTokens }, prompt) {
  const turns = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: prompt }];
  return {
    model: caller.value.base,
    ...target,
    messages: turns,
    ...(Number.isFinite(temperature) ? { temperature } : {}),
    ...(Number.isFinite(maxTokens) ? { max_tokens: maxTokens } : {}),
  };
}

/** Stream an answer; `update` gets what is known of it, again and again: text, tokens, fusion, times, fault. */
export async function follow(body, { scored, signal, update }) {
  const answer = { text: "", tokens: [], promptIds: null, fusion: null, times: null, fault: null, done: false };
  const began = performance.now();
  const extra = { stream_options: { include_usage: true }, ...(scored ? { logprobs: true, return_token_ids: true } : {}) };
  try {
    const { headers, events } = await stream("v1/chat/completions", { ...body, ...extra }, signal);
    answer.fusion = readFusion(headers);
    update({ ...answer });
    for await (const event of events) {
      read(answer, event, began);
      update({ ...answer });
    }
    answer.done = true;
  } catch (error) {
    if (isAbort(error)) return;
    if (!(error instanceof ApiError)) throw error;
    answer.fault = error.message;
  }
  update({ ...answer });
}

function read(answer, event, began) {
  if (event.prompt_token_ids) answer.promptIds = event.prompt_token_ids;
  const choice = event.choices?.[0];
  const text = choice?.delta?.content ?? "";
  if (text && !answer.text) answer.here = performance.now() - began;
  answer.text += text;
  if (choice?.finish_reason) answer.ended = choice.finish_reason;
  for (const [index, entry] of (choice?.logprobs?.content ?? []).entries()) {
    answer.tokens.push({ id: choice.token_ids?.[index], text: entry.token, logprob: entry.logprob });
  }
  if (event.usage) answer.usage = event.usage;
  if (event.metrics) {
    const { time_to_first_token_ms: first, queue_time_ms: queued, tokens_per_second: speed } = event.metrics;
    if (first != null) answer.times = { first: first + (queued ?? 0), speed };
  }
}

/** The log-probabilities that the base gives the tokens of an answer. */
export async function scoreTokens({ promptIds, tokens }, signal) {
  const body = { model: caller.value.base, prompt: [...promptIds, ...tokens.map(({ id }) => id)], max_tokens: 1, prompt_logprobs: 0 };
  const answer = await ask("v1/completions", { body, signal });
  const scores = answer.choices[0].prompt_logprobs.slice(promptIds.length);
  return tokens.map(({ id }, index) => scores[index][id].logprob);
}

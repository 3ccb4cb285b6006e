// OpenAI's client for Node: chat, stream, list of models, a path with a final slash, errors.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [modules, url, base, recipe, question, tokens] = process.argv.slice(2);
const found = createRequire(modules + "/").resolve("openai");
const { default: OpenAI, NotFoundError } = await import(pathToFileURL(found));
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 });
const ask = {
  messages: [{ role: "user", content: question }],
  max_tokens: Number(tokens),
  temperature: 0,
};

const chat = await client.chat.completions.create({ ...ask, model: recipe });
const field = await client.chat.completions.create({ ...ask, model: base, fusion: recipe });
let stream = "";
for await (const chunk of await client.chat.completions.create({ ...ask, model: recipe, stream: true })) {
  stream += chunk.choices[0]?.delta?.content ?? "";
}
const names = [];
for await (const model of client.models.list()) names.push(model.id);
const slash = await fetch(url + "/v1/models/");
let missing = "";
try {
  await client.chat.completions.create({ ...ask, model: "widde" });
} catch (error) {
  if (error instanceof NotFoundError) missing = error.message;
}
console.log(
  JSON.stringify({
    chat: chat.choices[0].message.content,
    model: chat.model,
    field: field.choices[0].message.content,
    stream,
    names,
    slash: slash.status,
    missing,
  }),
);

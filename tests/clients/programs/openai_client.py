"""OpenAI's Python client: chat, stream, completions, responses, list of models, errors."""

import json
import sys
from typing import Any

import openai

url, base, recipe, question, tokens = sys.argv[1:]
client: Any = openai.OpenAI(base_url=f"{url}/v1/", api_key="none", max_retries=0)
turns = [{"role": "user", "content": question}]
options = {"max_tokens": int(tokens), "temperature": 0}

chat = client.chat.completions.with_raw_response.create(model=recipe, messages=turns, **options)
field = client.chat.completions.create(model=base, messages=turns, **options, extra_body={"fusion": recipe})
stream = list(client.chat.completions.create(model=recipe, messages=turns, stream=True, **options))
response = client.responses.create(model=recipe, input=question, max_output_tokens=int(tokens), temperature=0)
completion = client.completions.create(model=recipe, prompt=question, **options)
try:
    client.chat.completions.create(model="widde", messages=turns, **options)
    missing = ""
except openai.NotFoundError as error:
    missing = error.message
try:
    client.chat.completions.create(model=recipe, messages=turns, temperature=-1)
    bad = ""
except openai.BadRequestError as error:
    bad = error.message
result = {
    "chat": chat.parse().choices[0].message.content,
    "mode": chat.headers["x-fusion-mode"],
    "field": field.choices[0].message.content,
    "stream": "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices),
    "models": sorted({chunk.model for chunk in stream}),
    "response": response.output_text,
    "completion": len(completion.choices[0].text),
    "names": [model.id for model in client.models.list()],
    "retrieved": client.models.retrieve(recipe).id,
    "missing": missing,
    "bad": bad,
}
print(json.dumps(result))

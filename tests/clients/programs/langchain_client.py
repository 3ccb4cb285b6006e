"""LangChain's ChatOpenAI: invoke, stream, batch, a fusion in the body."""

import json
import sys

from langchain_openai import ChatOpenAI

url, base, recipe, question, tokens = sys.argv[1:]
options = {"base_url": f"{url}/v1", "api_key": "none", "temperature": 0, "max_tokens": int(tokens), "max_retries": 0}
chat = ChatOpenAI(model=recipe, **options)
field = ChatOpenAI(model=base, extra_body={"fusion": recipe}, **options)
answer = chat.invoke(question)
result = {
    "chat": answer.content,
    "model": answer.response_metadata["model_name"],
    "field": field.invoke(question).content,
    "stream": "".join(chunk.content for chunk in chat.stream(question)),
    "batch": [one.content for one in chat.batch([question, question])],
}
print(json.dumps(result))

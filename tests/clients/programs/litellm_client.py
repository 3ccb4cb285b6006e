"""LiteLLM: chat by a recipe and by a field, stream, fallback from a name that is not there."""

import json
import sys

import litellm

url, base, recipe, question, tokens = sys.argv[1:]
litellm.telemetry = False
options = {
    "api_base": f"{url}/v1",
    "api_key": "none",
    "messages": [{"role": "user", "content": question}],
    "max_tokens": int(tokens),
    "temperature": 0,
    "num_retries": 0,
}


def ask(model: str, **more: object) -> str:
    answer = litellm.completion(model=f"openai/{model}", **options, **more)
    return str(answer.choices[0].message.content)


stream = litellm.completion(model=f"hosted_vllm/{recipe}", stream=True, **options)
try:
    ask("widde")
    missing = ""
except litellm.NotFoundError as error:
    missing = str(error)
router = litellm.Router(
    model_list=[
        {"model_name": name, "litellm_params": {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none"}}
        for name, model in (("gone", "widde"), ("here", recipe))
    ],
    fallbacks=[{"gone": ["here"]}],
    num_retries=0,
)
routed = router.completion(model="gone", messages=options["messages"], max_tokens=options["max_tokens"], temperature=0)
result = {
    "chat": ask(recipe),
    "field": ask(base, extra_body={"fusion": recipe}),
    "stream": "".join(chunk.choices[0].delta.content or "" for chunk in stream),
    "routed": routed.choices[0].message.content,
    "missing": missing,
}
print(json.dumps(result))

"""Inspect's two ways to an OpenAI endpoint: `openai-api/` by a recipe or a field, `vllm/` by a name in the list."""

import asyncio
import json
import os
import sys

from inspect_ai.model import GenerateConfig, get_model

url, base, recipe, question, tokens = sys.argv[1:]
os.environ |= {"FUSION_BASE_URL": f"{url}/v1", "FUSION_API_KEY": "none", "VLLM_BASE_URL": f"{url}/v1"}
plain = {"max_tokens": int(tokens), "temperature": 0, "max_retries": 0}


async def ask(model: str, **config: object) -> tuple[str, str]:
    output = await get_model(model, config=GenerateConfig(**plain, **config)).generate(question)
    return output.completion, output.model


async def main() -> dict[str, tuple[str, str]]:
    return {
        "recipe": await ask(f"openai-api/fusion/{recipe}"),
        "field": await ask(f"openai-api/fusion/{base}", extra_body={"fusion": recipe}),
        "vllm field": await ask(f"vllm/{base}", extra_body={"fusion": recipe}),
        "vllm profile": await ask(f"vllm/{base}:from-inspect"),
        "vllm adapter": await ask(f"vllm/{base}:wide"),
    }


print(json.dumps(asyncio.run(main())))

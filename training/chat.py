"""A quick look at an adapter without a server: `python -m training chat ADAPTER`."""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adapters
from training.base_model import load_tokenizer, resolve_base
from training.loop.lora_linear import hook_layers
from training.loop.model import set_weight
from training.rows.encoding import set_template


def chat(
    adapter: Path, *, base: str | None, weight: float, template: str, max_tokens: int, system: str, prompt: str | None
) -> None:
    """Answer one prompt, or every line typed until the end of input; greedy, streamed to the terminal."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = adapters.load(adapter)
    folder = resolve_base(base or loaded.base or "")
    tokenizer = load_tokenizer(folder)
    set_template(tokenizer, template)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if device == "cuda" else torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*'(answer_only|weight_range)'.* ignored")  # by PEFT
        model = PeftModel.from_pretrained(model, str(adapter)).to(device).eval()
    if loaded.answer_only:
        hook_layers(model, _keep_last)
    set_weight(model, weight)
    opening = [{"role": "system", "content": system}] if system else []
    if prompt is not None:
        _answer(model, tokenizer, [*opening, {"role": "user", "content": prompt}], max_tokens)
        return
    print("type a message; an empty line starts a new chat, Ctrl-D ends", file=sys.stderr)
    turns = list(opening)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        if not line.strip():
            turns = list(opening)
            continue
        turns.append({"role": "user", "content": line})
        turns.append({"role": "assistant", "content": _answer(model, tokenizer, turns, max_tokens)})


def _keep_last(low: Tensor) -> Tensor:
    """Zeros for all tokens of a pass but the last: `generate` computes the prompt in one pass, then token by token."""
    return torch.cat([torch.zeros_like(low[:, :-1]), low[:, -1:]], 1)


@torch.inference_mode()
def _answer(model: Any, tokenizer: Any, turns: list[dict[str, str]], max_tokens: int) -> str:
    from transformers import TextStreamer

    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inputs = inputs.to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(
        **inputs, max_new_tokens=max_tokens, do_sample=False, streamer=streamer, pad_token_id=tokenizer.pad_token_id
    )
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text

"""From chats to token rows: chat template and loss mask."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from training.errors import ConfigError
from training.rows.chats import Chat

TEMPLATES = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama2": (
        "{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{% set ns.system = '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' %}"
        "{% elif m['role'] == 'user' %}{{ bos_token }}[INST] {{ ns.system + m['content'] }} [/INST]"
        "{% set ns.system = '' %}{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
}
"""Chat templates for a base that has none."""


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One chat as tokens: `ids` int32 and `is_target` bool, both one per token; the target tokens have a loss."""

    ids: NDArray[np.int32]
    is_target: NDArray[np.bool_]
    where: str
    weight: float = 1.0
    """Weight of its tokens in the loss."""

    @property
    def acts(self) -> NDArray[np.bool_]:
        """Where an answer-only adapter acts: from the token that predicts the first target on."""
        targets = np.flatnonzero(self.is_target)
        return np.arange(len(self.ids)) >= (targets[0] - 1 if len(targets) else len(self.ids))

    def cut(self, length: int) -> "Row":
        """The first `length` tokens."""
        return replace(self, ids=self.ids[:length], is_target=self.is_target[:length])


def set_template(tokenizer: Any, choice: str) -> None:
    """Set the tokenizer's chat template to the chosen one; ConfigError that lists the choices when it has none."""
    if not choice:
        if not tokenizer.chat_template:
            raise ConfigError(
                "the base has no chat template: choose one with model.template = "
                f"{', '.join(map(repr, TEMPLATES))}, or the path of a Jinja file"
            )
        return
    if choice in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[choice]
    elif Path(choice).is_file():
        tokenizer.chat_template = Path(choice).read_text(encoding="utf-8")
    else:
        raise ConfigError(f"model.template is {choice!r}: expected {', '.join(TEMPLATES)} or a Jinja file")


def encode(tokenizer: Any, chat: Chat) -> Row:
    """Tokens by the tokenizer's own template; every assistant turn that is not muted is a target, including its end
    token.

    ConfigError when the template refuses the turns, or renders those before an answer differently once it follows.
    """
    ids, answers = _tokenize(tokenizer, chat)
    is_target = np.zeros(len(ids), bool)
    for start, stop in answers:
        is_target[start:stop] = True
    return Row(np.array(ids, np.int32), is_target, chat.where)


def encode_apart(tokenizer: Any, chat: Chat) -> list[Row]:
    """As `encode`, but a row for each answer that is a target, which ends with it: earlier answers are prompt in it, as
    they are where the model is served.
    """
    ids, answers = _tokenize(tokenizer, chat)
    line = np.array(ids, np.int32)
    return [Row(line[:stop], np.arange(stop) >= start, chat.where) for start, stop in answers]


def _tokenize(tokenizer: Any, chat: Chat) -> tuple[list[int], list[tuple[int, int]]]:
    """(token ids, [(first, after the last) token of each answer that is a target])."""
    ids: list[int] = []
    answers: list[tuple[int, int]] = []
    rendered = ""
    for i, (role, _) in enumerate(chat.messages):
        if role != "assistant":
            continue
        prompt_text = _render(tokenizer, chat, i, add_generation_prompt=True)
        full_text = _render(tokenizer, chat, i + 1)
        if not (prompt_text.startswith(rendered) and full_text.startswith(prompt_text)):
            raise ConfigError(
                f"{chat.where}: the chat template renders the turns before an answer differently once it follows"
            )
        full_text = full_text.rstrip("\n")
        before, after = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt_text, full_text))
        if before[: len(ids)] == ids and after[: len(before)] == before:
            prompt, answer = before[len(ids) :], after[len(before) :]
        else:  # a token would span the end of a prompt, where a served model begins to answer
            texts = (prompt_text[len(rendered) :], full_text[len(prompt_text) :])
            prompt, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
        ids += [*prompt, *answer]
        if i not in chat.muted:
            answers.append((len(ids) - len(answer), len(ids)))
        rendered = full_text
    return ids, answers


def find_unshown(tokenizer: Any, chat: Chat) -> list[str]:
    """What of a chat, besides roles and content, the chat template leaves out; ConfigError when that is a tool call,
    without which its turn would be empty.
    """
    keys = sorted({key for extras in chat.extras.values() for key in extras})
    whole = _render(tokenizer, chat, len(chat.messages)) if keys or chat.tools else ""
    unshown = [key for key in keys if _render(tokenizer, _drop(chat, key), len(chat.messages)) == whole]
    if "tool_calls" in unshown:
        raise ConfigError(f"{chat.where}: the chat template shows no tool calls: set model.template to one that does")
    if chat.tools and _render(tokenizer, replace(chat, tools=()), len(chat.messages)) == whole:
        unshown.append("tools")
    return unshown


def _drop(chat: Chat, key: str) -> Chat:
    extras = {i: {name: value for name, value in one.items() if name != key} for i, one in chat.extras.items()}
    return replace(chat, extras=extras)


def _render(tokenizer: Any, chat: Chat, count: int, **options: Any) -> str:
    """The text of the first `count` turns."""
    messages = [
        {"role": role, "content": content, **chat.extras.get(i, {})}
        for i, (role, content) in enumerate(chat.messages[:count])
    ]
    if chat.tools:
        options["tools"] = list(chat.tools)
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, jinja2.TemplateError) as error:
        raise ConfigError(f"{chat.where}: the chat template refuses these turns: {error}") from None
    return text

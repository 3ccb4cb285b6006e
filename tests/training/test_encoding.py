"""Token rows: which tokens carry the loss, and what chat templates may do."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaTokenizer

from training.errors import ConfigError
from training.rows.chats import Chat
from training.rows.encoding import encode, set_template

TALK = Chat(
    (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "See you.")), "t:1"
)


def test_every_answer_with_its_end_carries_the_loss_and_nothing_else(tiny_tokenizer: Any) -> None:
    row = encode(tiny_tokenizer, TALK)
    assert tiny_tokenizer.decode(row.ids[row.is_target]) == "Hello.<|im_end|>See you.<|im_end|>"
    turns = [{"role": role, "content": content} for role, content in TALK.messages]
    assert tiny_tokenizer.decode(row.ids) == tiny_tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")


def test_an_answer_begins_as_it_will_be_generated() -> None:
    pieces = ["\u2581", "\n", "|", "<", ">", *"abcdefghijklmnopqrstuvwxyz", *"HBSTWACEY", ".", " "]
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *pieces])}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[])  # puts a space before every text that it is given
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    row = encode(tokenizer, TALK)
    assert tokenizer.convert_ids_to_tokens(row.ids[row.is_target].tolist()) == [
        *"Hello.",
        "</s>",
        *"See",
        "\u2581",
        *"you.",
        "</s>",
    ]
    turns = [{"role": role, "content": content} for role, content in TALK.messages]
    whole = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
    assert row.ids.tolist() == tokenizer(whole, add_special_tokens=False).input_ids


def test_turns_that_a_template_refuses_are_named(tiny_tokenizer: Any) -> None:
    strict = deepcopy(tiny_tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="t:1: the chat template refuses these turns: roles must alternate"):
        encode(strict, TALK)
    with pytest.raises(ConfigError, match="t:2: the chat template refuses"):
        encode(tiny_tokenizer, Chat((("assistant", "Hi"), ("user", "a"), ("assistant", "b")), "t:2"))


def test_a_base_without_a_template_gets_a_choice(tiny_tokenizer: Any, tmp_path: Path) -> None:
    bare = deepcopy(tiny_tokenizer)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="model.template = 'chatml', 'llama2', or the path"):
        set_template(bare, "")
    set_template(bare, "chatml")
    assert (encode(bare, TALK).ids == encode(tiny_tokenizer, TALK).ids).all()
    bare.bos_token = "<|endoftext|>"
    set_template(bare, "llama2")
    row = encode(bare, TALK)
    assert bare.decode(row.ids[row.is_target]) == " Hello. <|im_end|> See you. <|im_end|>"
    assert bare.decode(row.ids).startswith("<|endoftext|>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    set_template(bare, str(tmp_path / "t.jinja"))
    assert bare.decode(encode(bare, TALK).ids) == "Be kind.|Hi|Hello.|Bye|See you.|"
    with pytest.raises(ConfigError, match="model.template is 'none'"):
        set_template(bare, "none")


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny_tokenizer: Any) -> None:
    other = deepcopy(tiny_tokenizer)
    other.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ConfigError, match="t:1: the chat template renders"):
        encode(other, TALK)

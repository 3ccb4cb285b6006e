"""Token rows: the loss mask, packing, and every row once per epoch."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaTokenizer

from training.config import ConfigError
from training.loop.model import attend, masked, rows_mask
from training.rows.encoding import IGNORE, Row, encode, passes, set_template, steps
from training.rows.readers import Chat

TALK = Chat(
    (("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "See you.")), "t:1"
)


def row(length: int, wanted: int = 1) -> Row:
    mask = numpy.zeros(length, bool)
    mask[length - wanted :] = True
    return Row(numpy.arange(length, dtype=numpy.int32), mask, f"row of {length}")


def test_every_answer_with_its_end_carries_the_loss_and_nothing_else(tiny_tokenizer: Any) -> None:
    found = encode(tiny_tokenizer, TALK)
    assert tiny_tokenizer.decode(found.ids[found.wanted]) == "Hello.<|im_end|>See you.<|im_end|>"
    turns = [{"role": role, "content": content} for role, content in TALK.messages]
    assert tiny_tokenizer.decode(found.ids) == tiny_tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")


def test_an_answer_begins_as_it_will_be_generated() -> None:
    pieces = ["\u2581", "\n", "|", "<", ">", *"abcdefghijklmnopqrstuvwxyz", *"HBSTWACEY", ".", " "]
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *pieces])}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[])  # puts a space before every text that it is given
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    found = encode(tokenizer, TALK)
    assert tokenizer.convert_ids_to_tokens(found.ids[found.wanted].tolist()) == [
        *"Hello.",
        "</s>",
        *"See",
        "\u2581",
        *"you.",
        "</s>",
    ]
    turns = [{"role": role, "content": content} for role, content in TALK.messages]
    whole = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
    assert found.ids.tolist() == tokenizer(whole, add_special_tokens=False).input_ids


def test_turns_that_a_template_refuses_are_named(tiny_tokenizer: Any) -> None:
    strict = deepcopy(tiny_tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="t:1: the chat template refuses these turns: roles must alternate"):
        encode(strict, TALK)
    with pytest.raises(ConfigError, match="t:2: the chat template refuses"):
        encode(tiny_tokenizer, Chat((("assistant", "Hi"), ("user", "a"), ("assistant", "b")), "t:2"))


def test_a_base_without_a_template_gets_a_choice(tiny_tokenizer: Any, tmp_path: Any) -> None:
    bare = deepcopy(tiny_tokenizer)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="model.template = 'chatml', 'llama2', or the path"):
        set_template(bare, "")
    set_template(bare, "chatml")
    assert (encode(bare, TALK).ids == encode(tiny_tokenizer, TALK).ids).all()
    bare.bos_token = "<|endoftext|>"
    set_template(bare, "llama2")
    found = encode(bare, TALK)
    assert bare.decode(found.ids[found.wanted]) == " Hello. <|im_end|> See you. <|im_end|>"
    assert bare.decode(found.ids).startswith("<|endoftext|>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]")
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    set_template(bare, str(tmp_path / "t.jinja"))
    assert bare.decode(encode(bare, TALK).ids) == "Be kind.|Hi|Hello.|Bye|See you.|"
    with pytest.raises(ConfigError, match="model.template is 'none'"):
        set_template(bare, "none")


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny_tokenizer: Any) -> None:
    other = deepcopy(tiny_tokenizer)
    other.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ConfigError, match="t:1: the chat template writes"):
        encode(other, TALK)


@given(st.lists(st.integers(2, 60), min_size=1, max_size=30), st.integers(40, 100), st.integers(1, 4), st.booleans())
def test_passes_hold_every_row_once_within_the_limit(lengths: list[int], limit: int, shares: int, pack: bool) -> None:
    rows = [row(length, min(length - 1, 3)) for length in lengths]
    made = passes(rows, range(len(rows)), limit, shares, pack=pack, pad=9, share=False)
    assert sorted(number for one in made for number in one.rows) == list(range(len(rows)))
    assert sum(one.wanted for one in made) == sum(int(one.wanted.sum()) for one in rows)
    assert all(one.ids.numel() <= limit or len(one.rows) == 1 for one in made)
    if pack:
        assert len(made) % shares == 0 or len(made) == len(rows)
        assert sum(one.ids.numel() for one in made) == sum(lengths)
    for one in made:
        places = (
            [(0, start) for start in numpy.cumsum([0, *one.lengths[:-1]])]
            if pack
            else [(i, 0) for i in range(len(one.rows))]
        )
        for number, (line, start) in zip(one.rows, places, strict=True):
            stop = start + len(rows[number].ids)
            assert (one.ids[line, start:stop].numpy() == rows[number].ids).all()
            assert one.positions[line, start:stop].tolist() == list(range(len(rows[number].ids)))
            assert (one.labels[line, start:stop] != IGNORE).tolist() == rows[number].wanted.tolist()


def test_a_row_s_first_token_is_not_learned_from_the_row_before() -> None:
    whole = replace(row(5), wanted=numpy.ones(5, bool))
    (made,) = passes([whole, whole], [0, 1], 100, 1, pack=True, pad=0)
    assert made.wanted == 8 and made.shared == 0


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=2, max_size=6), st.integers(0, 12))
def test_rows_share_their_beginning_and_lose_nothing(parts: list[tuple[int, int]], common: int) -> None:
    rows = []
    for i, (asked, answered) in enumerate(parts):
        ids = [7] * common + [100 + i] * asked + [200 + i] * answered
        wanted = [False] * (common + asked) + [True] * answered
        rows.append(Row(numpy.array(ids, numpy.int32), numpy.array(wanted, bool), f"r:{i}"))
    (made,) = passes(rows, range(len(rows)), 10**6, 1, pack=True, pad=0)
    assert made.shared == common
    assert made.wanted == sum(answered for _, answered in parts)
    start = made.shared
    for row_, length in zip(rows, made.lengths, strict=True):
        ids = torch.cat([made.ids[0, : made.shared], made.ids[0, start : start + length]])
        positions = torch.cat([made.positions[0, : made.shared], made.positions[0, start : start + length]])
        labels = torch.cat([made.labels[0, : made.shared], made.labels[0, start : start + length]])
        assert ids.tolist() == row_.ids.tolist() and positions.tolist() == list(range(len(ids)))
        assert (labels != IGNORE).tolist() == row_.wanted.tolist()
        start += length


def test_an_epoch_holds_every_row_once_in_its_own_order() -> None:
    first, second = steps(37, 4, 0, 0), steps(37, 4, 0, 1)
    for one in (first, second):
        assert Counter(number for step in one for number in step) == Counter(range(37))
        assert [len(step) for step in one] == [4] * 9 + [1]
    assert first != second and first == steps(37, 4, 0, 0) and first != steps(37, 4, 1, 0)


@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("heads", [2, 4])
def test_one_masked_product_is_the_products_of_the_rows(shared: int, heads: int) -> None:
    """What GPUs compute against what CPUs do, with fewer key heads than query heads too."""
    lengths = (5, 1, 7)
    width = shared + sum(lengths)
    query, key, value = (torch.randn(1, n, width, 8, dtype=torch.float64) for n in (4, heads, heads))
    apart, _ = attend(torch.nn.Identity(), query, key, value, None, row_lengths=lengths, shared=shared)
    together = masked(query, key, value, rows_mask((shared, *lengths), query.device))
    torch.testing.assert_close(together, apart)

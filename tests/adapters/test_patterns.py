"""Patterns of module names: read as PEFT reads them, in linear time, without Python's `re`."""

import contextlib
import re
import time
import warnings

import pytest
from hypothesis import given, settings, strategies as st
from peft.utils.other import get_pattern_key

from adapters import AdapterError
from adapters.files.matcher import PatternTable
from tests.adapters import samples  # noqa: F401  (loads the hypothesis profile)

NAMES = [
    f"{root}layers.{layer}.{kind}"
    for root in ("model.", "base.decoder.", "")
    for layer in (0, 1, 3, 12, 21)
    for kind in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.experts.7.down-proj", "lm_q_proj")
]
REAL = [
    "q_proj",
    "self_attn.q_proj",
    "layers.3.self_attn.v_proj",
    "model.layers.12.mlp.up_proj",
    r".*\.layers\.(0|1|2)\..*",
    r"^model\.layers\.\d+\.mlp\.up_proj$",
    r"(.*\.)?q_proj",
    r"layers\.[0-3]\.mlp\..*",
    r"layers\.[0-9]+\.self_attn\.(q|v)_proj",
    r"layers\.(?:1[0-9]|2[01])\.self_attn\..*",
    r".*(q|k|v|o)_proj",
    r".*\.experts\.\d{1,2}\.down-proj",
    r"(?:.*?\.)?layers\.1.*up_proj",
    r"layers\.(?P<n>\d)\..*",
    r"\w+_proj",
    "^model",
    "nowhere",
]
pieces = st.sampled_from(
    ["a", "b", "1", r"\.", ".", "_", "-", r"\d", r"\w", r"\D", "[ab]", "[^a]", "[0-9]", "[a-b1]", r"[\d_]", "^", "$"]
)
repeats = st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{,2}", "{0}", "*?", "+?", "??", "{,}"])
patterns = st.recursive(
    pieces,
    lambda inner: (
        st.builds("".join, st.lists(inner, min_size=1, max_size=3))
        | st.builds("({}|{})".format, inner, inner | st.just(""))
        | st.builds("(?:{}){}".format, inner, repeats)
    ),
    max_leaves=8,
)
names = st.text("ab1._-", min_size=1, max_size=9)


@settings(max_examples=400)
@given(st.lists(patterns, min_size=1, max_size=4), st.lists(names, min_size=1, max_size=8))
def test_the_first_pattern_that_matches_is_the_one_of_peft(keys: list[str], modules: list[str]) -> None:
    table = PatternTable(keys, "rank_pattern")
    for module in modules:
        index = table.find(module)
        assert (module if index is None else keys[index]) == get_pattern_key(keys, module)


@given(st.text("ab1._-()|*+?{}[]^$\\d,2:P<", min_size=1, max_size=8), st.lists(names, min_size=1, max_size=8))
def test_what_is_read_at_all_has_the_meaning_it_has_for_re(key: str, modules: list[str]) -> None:
    try:
        table = PatternTable([key], "rank_pattern")
    except AdapterError:
        return
    with warnings.catch_warnings(action="ignore"):  # sets that a future `re` may read otherwise
        pattern = re.compile(rf"(.*\.)?({key})$")
    for module in modules:
        assert (table.find(module) is not None) == (pattern.match(module) is not None)


@pytest.mark.parametrize("key", REAL)
def test_patterns_of_real_configs_are_read_as_peft_reads_them(key: str) -> None:
    table = PatternTable([key], "rank_pattern")
    for name in NAMES:
        assert (name if table.find(name) is None else key) == get_pattern_key([key], name)


@pytest.mark.parametrize(
    "key",
    [
        *("(", ")", "a)|(b", "(?=a)", "(?i)a", r"\1", r"\b", "a**", "a*+", "a{2}{3}", "*a", "^*", "a{257}", "a{3,2}"),
        *("[a", "[b-a]", "{x}", "(?P=x)", "(?i)a", "\\", "a" * 1025, "(" * 40 + "a" + ")" * 40),
    ],
)
def test_other_patterns_are_refused_by_name(key: str) -> None:
    with pytest.raises(AdapterError, match="expected a simple pattern of names") as caught:
        PatternTable([key], "rank_pattern")
    assert caught.value.reason == "bad_config"
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("keys", "module"),
    [
        (["(.|.)" * 50 + "x"], "a" * 80),
        ([".?" * 200 + "x"], "a" * 200),
        (["(a|a)*b", "(?:a*)*b", "a*a*a*a*a*b", "((a+)?)+b"], "a" * 250),
        ([".*" * 400 + "x"], "a.b" * 80),
        (["((((){256}){256}){256}){256}"], "a"),
        (["(((a{250}){250}){250}){250}"], "a" * 250),
        (["(((a?){250}){4}){4}"], "a" * 250),
        ([f".*a.{{{count % 200}}}b" for count in range(4096)], "ab" * 120),
        ([f"{'.' * count}q" for count in range(1000)], "." * 250),
    ],
)
def test_a_hostile_pattern_takes_no_time(keys: list[str], module: str) -> None:
    start = time.process_time()
    with contextlib.suppress(AdapterError):  # which says that the pattern would take too long
        assert PatternTable(keys, "rank_pattern").find(module) is None
    assert time.process_time() - start < 5

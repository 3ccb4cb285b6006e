"""Adapters that act on the answer alone: their files, what is fused of them, and recipes that use them on prompts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from adapters import AdapterError, RecipeError, check_prompt, fuse, load, parse, plan, save
from adapters.cli import main
from adapters.convert.conversion import convert
from adapters.files.one_rank import to_one_rank
from adapters.together import name_like
from tests.adapters.samples import CONFIG, SHAPES, adapter, dense, gap

PLAIN = adapter(1)
ANSWERING = replace(adapter(2), answer_only=True)
OTHER = replace(adapter(3), answer_only=True)
ADAPTERS = {"p": PLAIN, "a": ANSWERING, "b": OTHER}


def edit(folder: Path, **keys: object) -> Path:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return folder


def test_a_folder_says_so_and_only_where_it_is_true(tmp_path: Path) -> None:
    save(ANSWERING, tmp_path / "a")
    save(PLAIN, tmp_path / "p")
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["answer_only"] is True
    assert "answer_only" not in json.loads((tmp_path / "p" / CONFIG).read_text())
    for lazy in (False, True):
        read = load(tmp_path / "a", lazy=lazy)
        assert (read.answer_only, read.digest, read.notes) == (True, ANSWERING.digest, ())
        assert not load(tmp_path / "p", lazy=lazy).answer_only
    for value in (False, None):
        assert load(edit(tmp_path / "a", answer_only=value)).digest == adapter(2).digest
    with pytest.raises(AdapterError, match=r"answer_only is 'yes': expected true or false \[bad_config\]"):
        load(edit(tmp_path / "a", answer_only="yes"))


def test_the_flag_is_part_of_the_content() -> None:
    assert ANSWERING.digest != adapter(2).digest == replace(ANSWERING, answer_only=False).digest


def test_it_survives_every_change_of_form(tmp_path: Path) -> None:
    ranks = {name: 1 + index for index, name in enumerate(SHAPES)}
    uneven = replace(adapter(4, ranks), answer_only=True)
    assert to_one_rank(uneven).answer_only
    save(uneven, tmp_path / "a")
    assert convert(tmp_path / "a", tmp_path / "b", one_rank=True).adapter.answer_only
    assert load(tmp_path / "b").answer_only
    modules = {f"base.{name}": module for name, module in PLAIN.modules.items()}
    assert name_like(uneven, replace(PLAIN, modules=modules)).answer_only


def test_peft_reads_the_folder_and_says_that_it_ignores_the_key(tmp_path: Path) -> None:
    from peft import PeftConfig

    save(ANSWERING, tmp_path / "a")
    with pytest.warns(UserWarning, match=r"'answer_only'\].* are\s+ignored"):
        config = PeftConfig.from_pretrained(str(tmp_path / "a"))
    assert config.r == ANSWERING.rank


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        ("0.6*a + 0.4*b", "0.6*a + 0.4*b"),
        ("1*a + 0*p", "1*a + 0*p"),
        ("answer(0.6*a + 0.4*p)", "0.6*x + 0.4*p"),
        ("answer(0.6*p)", "0.6*p"),
        ("steps(0: 0.4)*a", "0.4*a"),
        ("{*: steps(0: 0.4)}*p", "0.4*p"),
        ("svd(0.6*a + 0.4*b, rank=2)", "svd(0.6*a + 0.4*b, rank=2)"),
    ],
)
def test_what_acts_on_the_answer_alone_is_fused_to_such_an_adapter(text: str, same_as: str) -> None:
    fused, report = fuse(parse(text), ADAPTERS)
    plain = {**{name: replace(one, answer_only=False) for name, one in ADAPTERS.items()}, "x": adapter(2)}
    expected, _ = fuse(parse(same_as), plain)
    assert fused.answer_only
    assert not expected.answer_only
    assert gap(dense(fused), dense(expected)) < 1e-6
    assert plan(parse(text), ADAPTERS).error == report.error


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0.6*a + 0.4*p", "'a' is an answer-only adapter, but '0.6*a + 0.4*p' lets it act on the prompt: expected "
         "'answer(0.6*a + 0.4*p)' or 'steps(0: 0.6)*a'"),
        ("1*p + ramp(0..1)*a", "'steps(0: ramp(0..1))*a'"),
        ("1*p + fade(1..0, 4)*a", "'answer(fade(1..0, 4)*a + 1*p)' or 'steps(0: …)*a'"),
        ("1*p + steps(prompt: 0.5, 0: 1)*a", "expected 'steps(0: …)*a'"),
        ("{*: steps(prompt: 0, 0: 1)}*a + 1*b", "'b' is an answer-only adapter"),
        ("[0, 0, 1]*a + 1*p", "'answer([0, 0, 1]*a + 1*p)'"),
        ("ties(1*a + 1*p, density=0.5)", "expected a weighted sum inside answer(…)"),
        ("safe_merge(1*p, safety=a, threshold=0.3)", "expected 'answer(safe_merge(p, safety=a, threshold=0.3))'"),
        ("gate(1*p + 0*a, by=g, a in 0..1)", "expected 'gate(answer(0*a + 1*p), by=g, a in 0..1)'"),
    ],
)  # fmt: skip
def test_a_weight_on_the_prompt_is_refused_with_the_way_out(text: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_prompt(parse(text), ["a", "b"], text)
    assert says in str(caught.value)
    position = caught.value.position
    assert position is not None
    assert text[position] in "ab"


@pytest.mark.parametrize(
    "text",
    [
        "1*p",
        "answer(0.6*a + 0.4*b)",
        "0.5*p + steps(0: 0.4)*a",
        "1*p + 0*a",
        "1*p + steps(prompt: 0, 0: 1)*a + {*.mlp.*: 0, *: steps(1: 2)}*b",
        "gate(answer(1*p + 1*a), by=g, a in 0..1)",
        "answer(safe_merge(1*p, safety=a, threshold=0.3))",
    ],
)
def test_what_leaves_the_prompt_alone_is_not(text: str) -> None:
    check_prompt(parse(text), ["a", "b"])


def test_a_sum_with_a_plain_adapter_is_no_adapter() -> None:
    with pytest.raises(RecipeError, match="'a' is an answer-only adapter"):
        fuse(parse("0.6*a + 0.4*p"), ADAPTERS)


def test_the_commands_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, one in ADAPTERS.items():
        save(one, tmp_path / name)

    def call(command: str, text: str, *more: str) -> tuple[int, str]:
        names = [word for name in parse(text).adapters for word in ("--adapter", f"{name}={tmp_path / name}")]
        status = main([command, text, *names, *more])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    out = str(tmp_path / "out")
    for command, more in (("plan", ()), ("fuse", ("--out", out))):
        status, text = call(command, "0.6*a + 0.4*p", *more)
        assert (status, "'answer(0.6*a + 0.4*p)' or 'steps(0: 0.6)*a'" in text) == (2, True)
        status, text = call(command, "0.6*a + 0.4*b", *more)
        assert (status, "acts on the answer alone: serve it inside answer(…)" in text) == (0, True)
    assert load(out).answer_only
    assert call("plan", "0.5*p + steps(0: 0.4)*a")[0] == 0
    assert call("plan", "steps(prompt: 0.1, 0: 0.4)*a")[0] == 2
    assert main(["show", out]) == 0
    assert "acts on the answer alone" in capsys.readouterr().out

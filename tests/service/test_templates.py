"""Clients' chat templates: rendered as transformers renders them, by a child that its limits end."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
import vllm
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template
from vllm.renderers.hf import _detect_content_format

from service.engine.children import CHILDREN
from service.engine.templates import TemplateError, TemplateRenderer, TemplatesBusyError
from tests.conftest import BASE

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]
TURNS = [{"role": "user", "content": "Näme <three> rivers."}, {"role": "assistant", "content": "Sure: "}]
HONEST = "{% for m in messages %}<{{ m['content'] | trim }}>{{ m | tojson }}{% endfor %}{{ bos_token }}{{ strange }}"
PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
BOMBS = {
    "endless": ENDLESS,
    "computed when compiled": "{{ '%0300000000d' % 1 }}",
    "doubling": "{% set t = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set t.x = t.x ~ t.x %}{% endfor %}",
    "list": "{% set t = range(99999) | list %}{% for i in range(9999) %}{% set _ = t.append(t | list) %}{% endfor %}",
    "wide": "{{ 'a'.center(2000000000) }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "deep": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "recursive": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "pattern": "{{ ('a' * 40) | wordwrap(1) | replace('a', 'aaaaaaaaaaaaaaaaaaaaaaaa') | urlize * 100000000 }}",
    "assigned in a circle": "{% set a = messages %}{% set b = a %}{% set a = b %}" + ENDLESS,
    "long text": "{% for i in range(90000) %}{{ 'a' * 100 }}{% endfor %}",
}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def start_renderer() -> AsyncIterator[TemplateRenderer]:
    made = TemplateRenderer(2**20)
    await made.start()
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture(scope="module")
async def renderer() -> AsyncIterator[TemplateRenderer]:
    """One for all: its children start in seconds."""
    async with start_renderer() as made:
        yield made


@pytest.fixture
async def own() -> AsyncIterator[TemplateRenderer]:
    """For a test that looks at the processes."""
    async with start_renderer() as made:
        yield made


@pytest.mark.parametrize("template", [HONEST, PARTS, "{% generation %}x{% endgeneration %}", None])
@pytest.mark.parametrize("arguments", [{}, {"add_generation_prompt": True, "tools": [{"type": "function"}]}])
async def test_a_text_is_the_one_that_transformers_makes(
    renderer: TemplateRenderer, template: str | None, arguments: dict[str, Any]
) -> None:
    template = template or str(AutoTokenizer.from_pretrained(BASE).chat_template)
    turns: list[dict[str, Any]] = [dict(turn) for turn in TURNS]
    if template == PARTS:
        turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    options = {"bos_token": "<s>", **arguments}
    (expected,), _ = render_jinja_template([turns], chat_template=template, **options)
    assert await renderer.render(template, turns, options) == expected


@pytest.mark.parametrize(
    ("template", "words"),
    [("ok\n{% for", "line 2"), ("{% break %}", "break"), ("{{ raise_exception('no tools') }}", "^no tools$")],
)
async def test_a_template_s_own_error_is_the_reason(renderer: TemplateRenderer, template: str, words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        await renderer.check(template)


async def test_a_final_message_is_continued(renderer: TemplateRenderer) -> None:
    template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    assert (await renderer.render(template, TURNS, {"continue_final_message": True})).endswith("<Sure: ")


CONTENT_FORMS = [
    HONEST,
    PARTS,
    "{% for m in messages[1:] %}{% set c = m['content'] %}{% for p in c %}{{ p }}{% endfor %}{% endfor %}",
    "{% macro show(c) %}{% for p in c %}{{ p }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
    "{% for m in messages %}{% for t in m.tool_calls %}{{ t }}{% endfor %}{{ m.content }}{% endfor %}",
    "{% for content in messages %}{{ content }}{% endfor %}",
]


async def test_the_form_of_contents_is_the_one_that_vllm_detects(renderer: TemplateRenderer) -> None:
    shipped = [path.read_text() for path in Path(vllm.__file__).parent.rglob("*.jinja")]
    assert shipped
    assert [opened.unknown for opened in [await renderer.open(text) for text in shipped] if opened.unknown] == []
    for text in (*CONTENT_FORMS, *shipped):
        opened = await renderer.open(text)
        assert opened.content_format == _detect_content_format(text, default="string"), text[:200]


@pytest.mark.parametrize(
    ("template", "unknown"),
    [
        ("{{ f(1) }}", "f"),
        ("{% if messages | length > 9 %}{{ f() }}{% endif %}", "f"),
        ("{% if f is defined %}{{ f() }}{% endif %}", None),
        ("{% macro f(a) %}{{ caller() }}{% endmacro %}{% call f(1) %}x{% endcall %}{{ f(2) }}", None),
        ("{% for m in messages recursive %}{{ m.content.strip() }}{% endfor %}", None),
        ("{{ strftime_now('%Y') }}{% set n = namespace(a=1) %}{{ range(3) | list }}{{ dict(a=1) }}", None),
    ],
)
async def test_a_function_that_nothing_defines_is_found(
    renderer: TemplateRenderer, template: str, unknown: str | None
) -> None:
    assert (await renderer.open(template)).unknown == unknown
    if unknown is not None:
        with pytest.raises(TemplateError, match="'f'|f' is undefined"):
            await renderer.check(template)


async def test_the_variables_of_a_template_are_known(renderer: TemplateRenderer) -> None:
    assert {"messages", "bos_token", "strange"} <= (await renderer.open(HONEST)).variables


@pytest.mark.parametrize("name", BOMBS)
async def test_no_template_takes_longer_or_more_than_its_limits(renderer: TemplateRenderer, name: str) -> None:
    start = time.monotonic()
    with pytest.raises(TemplateError):
        await renderer.check(BOMBS[name])
    assert time.monotonic() - start < 20
    assert await renderer.render("{{ messages | length }}", TURNS, {}) == "2"


async def test_many_bad_templates_at_once_are_refused_or_told_to_come_again(renderer: TemplateRenderer) -> None:
    async def check(i: int) -> type[Exception] | None:
        try:
            await renderer.check(f"{ENDLESS}{i}")
        except (TemplateError, TemplatesBusyError) as error:
            return type(error)
        return None

    kinds = await asyncio.gather(*(check(i) for i in range(60)))
    assert set(kinds) == {TemplateError, TemplatesBusyError}
    while True:  # those that were given up still run to their limits
        try:
            assert await renderer.render("{{ messages | length }}", TURNS, {}) == "2"
            break
        except TemplatesBusyError:
            await anyio.sleep(0.1)


async def test_a_client_that_leaves_costs_no_process(own: TemplateRenderer) -> None:
    pids = [child._process and child._process.pid for child in own._all]  # noqa: SLF001 - which processes there are
    for _ in range(3 * CHILDREN):
        with anyio.move_on_after(0):
            await own.render(HONEST, TURNS, {})
    await anyio.sleep(0.5)
    assert await own.render("{{ messages | length }}", TURNS, {}) == "2"
    assert [child._process and child._process.pid for child in own._all] == pids  # noqa: SLF001 - as above


@pytest.mark.parametrize(
    "template",
    [
        "{% include '/etc/passwd' %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{% import 'os' as o %}",
    ],
)
async def test_the_sandbox_shows_nothing(renderer: TemplateRenderer, template: str) -> None:
    with pytest.raises(TemplateError):
        await renderer.check(template)


async def test_a_child_can_open_nothing_and_knows_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    async with start_renderer() as made:
        for child in made._all:  # noqa: SLF001 - which processes there are
            assert child._process is not None  # noqa: SLF001
            (fork,) = psutil.Process(child._process.pid).children()  # noqa: SLF001
            process = Path(f"/proc/{fork.pid}")
            assert "secret" not in (process / "environ").read_text()
            limits = (process / "limits").read_text()
            for name in ("Max open files", "Max processes", "Max file size"):
                (line,) = [line for line in limits.splitlines() if line.startswith(name)]
                assert line.removeprefix(name).split()[:2] == ["0", "0"]
            assert len(os.listdir(process / "fd")) <= 3


async def test_children_end_with_their_renderer() -> None:
    async with start_renderer() as made:
        servers = [psutil.Process(child._process.pid) for child in made._all if child._process]  # noqa: SLF001 - as above
        children = [*servers, *(fork for process in servers for fork in process.children())]
        assert len(children) == 2 * CHILDREN  # each with its fork
    assert psutil.wait_procs(children, timeout=10)[1] == []

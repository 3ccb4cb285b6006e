"""No text or file of a stranger keeps the interpreter's lock: whatever it is, everything else goes on.

Every reader gets inputs of up to 1 MB, known bombs and drawn ones, while `watch` measures the longest time for which
nothing else could run.
"""

import contextlib
import fnmatch
import io
import json
import random
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from adapters import (
    FusionError,
    LoraModule,
    UnknownAdapterError,
    did_you_mean,
    from_json,
    load,
    make_adapter,
    parse,
    save,
    tabulate,
)
from adapters.errors import quote
from adapters.files import unpack_adapter
from adapters.files.config import read_config
from adapters.files.header import read_header
from adapters.recipes.globs import select
from tests.adapters import samples
from tests.adapters.samples import CONFIG, WEIGHTS
from tests.adapters.test_archive import header as tar_header, member, record
from tests.ticks import watch

MB = 2**20
LOCK_S = 0.2
"""The longest that a reader may keep the lock."""
TOTAL_S = 5
"""The longest that a reader may work at all, in CPU time."""

NAMES = [f"model.layers.{layer}.{kind}_proj" for layer in range(12) for kind in ("q", "v", "up")] + ["a" * 256]


def read_patterns(content: bytes) -> None:
    config = read_config(content)
    for name in NAMES:
        config.scaling(name)


def read_weights(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / WEIGHTS
        file.write_bytes(struct.pack("<Q", len(content)) + content + bytes(64))
        read_header(file, file.stat().st_size)


def read_archive(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        unpack_adapter(io.BytesIO(content), Path(folder))


def read_recipe(content: bytes) -> None:
    parse(content.decode(errors="replace"))


def read_json_recipe(content: bytes) -> None:
    from_json(json.loads(content))


READERS: dict[str, Callable[[bytes], None]] = {
    "config": read_patterns,
    "weights": read_weights,
    "archive": read_archive,
    "recipe": read_recipe,
    "json": read_json_recipe,
}


def config(**content: object) -> bytes:
    return json.dumps({"peft_type": "LORA", "r": 8, **content}).encode()


def entry(**content: object) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **content}}).encode()


BIG = 140737488355327
BOMBS: list[tuple[str, bytes]] = [
    ("config", config(rank_pattern={"(.|.)" * 50 + "x": 8})),
    ("config", config(alpha_pattern={".?" * 500 + "x": 8})),
    ("config", config(rank_pattern={f"{n}(.*a.{{200}}){{5}}": 8 for n in range(4000)})),
    ("config", config(rank_pattern={"." * n + "q": 8 for n in range(1000)})),
    ("config", config(rank_pattern={f"[{'ab' * 500}{n}]": 8 for n in range(500)})),
    ("config", config(lora_alpha=[BIG] * 60_000)),
    ("config", config(modules_to_save=[[]] * 120_000)),
    ("config", config(use_dora={str(n): n for n in range(70_000)})),
    ("config", config(init_lora_weights="PISSA" * 200_000)),
    ("config", b"[" * MB),
    ("config", b'{"a":' * (MB // 5)),
    ("config", b"[" + b"[]," * (MB // 3) + b"0]"),
    ("config", b'{"r": ' + b"9" * MB + b"}"),
    ("config", b'{"r": 1.' + b"9" * MB + b"}"),
    ("config", b'{"r": 1e' + b"9" * MB + b"}"),
    ("config", b'{"r": [' + (b"9" * 4299 + b",") * 240 + b"0]}"),
    ("config", b'{"r": "' + b"\\u0041" * (MB // 6) + b'"}'),
    ("weights", entry(shape=[BIG] * 60_000)),
    ("weights", entry(shape=[BIG] * 60)),
    ("weights", entry(dtype="F" * MB)),
    ("weights", entry(data_offsets=[10**4000, 0])),
    ("weights", b'{"' + b"a" * MB),
    ("weights", b'{"' + b"\\" * MB),
    ("weights", b'{"__metadata__":{' + b'"a":"b",' * (MB // 8)),
    ("weights", b'{"__metadata__":{' + b'"' * MB + b"}}"),
    ("weights", b'{"__metadata__":{' + b",".join(b'"%d":""' % n for n in range(100_000)) + b"}}"),
    ("weights", b'{"a":' * (MB // 5)),
    ("weights", b"{" * MB),
    ("weights", b" " * MB),
    ("weights", b"[" + b"[]," * (MB // 3) + b"0]"),
    ("weights", b"{" + b",".join(b'"%d":{}' % n for n in range(90_000)) + b"}"),
    ("archive", tar_header(b"x", b"\xff" * 10 + b"\xfe\0") * 1000),
    ("archive", tar_header(b"x", 0) * 2000),
    ("archive", member(b"x", b"1" * 200_000, b"x")),
    ("archive", member(b"x", b"1" * 900_000, b"x")),
    ("archive", member(b"x", record(b"a", b"b") * 30_000, b"x")),
    ("archive", member(b"x", b"y" * 900_000, b"L")),
    ("recipe", b"(" * MB),
    ("recipe", b"9" * MB + b"*a"),
    ("recipe", b"9" * 8000 + b"*a"),
    ("recipe", b"a + " * 2000 + b"a"),
    ("recipe", b" " * 8191 + b"a"),
    ("recipe", b"{" + b"a:1," * 2000),
    ("recipe", b"a" * 8192),
    ("recipe", "é".encode() * (MB // 2)),
    ("recipe", b"x(" * 4000),
    ("recipe", b"ties(a, a=" + b"1" * 8000 + b")"),
    ("json", json.dumps({"adapters": [{"name": "a", "weight": 1}] * 30_000}).encode()),
    ("json", json.dumps({"adapters": [{"name": "a" * MB}]}).encode()),
    ("json", json.dumps({"adapters": [{"name": "a", "weight": 10**4000}]}).encode()),
    ("json", json.dumps({"adapters": [{"name": "a", "weight": [BIG] * 60_000}]}).encode()),
    ("json", json.dumps({"adapters": [{"name": "a"}], "method": [BIG] * 60_000}).encode()),
    ("json", json.dumps({"adapters": [{"name": "a"}], "x" * MB: 1}).encode()),
    ("json", json.dumps({"adapters": [{"name": "a", "weight": {f"{n:0128}": 1 for n in range(7000)}}]}).encode()),
    ("json", json.dumps({"adapters": {str(n): n for n in range(60_000)}}).encode()),
]


def check(reader: str, content: bytes) -> str:
    """Read it, watched; what was said of it."""
    message = ""
    start = time.process_time()
    with watch() as ticks:
        try:
            READERS[reader](content)
        except (FusionError, ValueError, RecursionError) as error:  # the last two: from `json.loads` in this file
            message = str(error)
    assert ticks.longest_s < LOCK_S
    assert time.process_time() - start < TOTAL_S
    assert len(message) < 600
    return message


@pytest.mark.parametrize(("reader", "content"), BOMBS)
def test_a_bomb_keeps_nobody_waiting(reader: str, content: bytes) -> None:
    assert len(content) < 1.2 * MB
    check(reader, content)


FRAGMENTS: dict[str, tuple[bytes, ...]] = {
    "config": (
        *(b'{"peft_type":"LORA","rank_pattern":{"', b'":8}}', b"(", b")", b"|", b".", b"*", b"a", b"[a-z]", b"{9}"),
        *(b"?", b'"', b":", b",", b"[", b"]", b"1", b"{", b"}", b"\\\\", b"e", b"\\ud800", b"\xff", b"-", b" "),
    ),
    "weights": (
        *(b'{"a":{"dtype":"F32","shape":[', b'],"data_offsets":[0,4]},', b'"__metadata__":{', b'"', b"\\", b"9"),
        *(b"9,", b"[", b"]", b"{", b"}", b":", b",", b" ", b'"b":{},', b'"c":"d",', b"\xf0\x9f\x98\x80", b"\n"),
    ),
    "archive": (
        *(tar_header(b"x", 0), tar_header(CONFIG.encode(), 512), tar_header(b"y", 2048, b"x"), bytes(512)),
        *(tar_header(b"y", 2048, b"L"), record(b"path", b"z") * 50, b"1" * 512, tar_header(b"", b"\x80" + bytes(11))),
    ),
    "recipe": (
        *(b"a", b"(", b")", b"+", b"*", b"0.5", b"1e9", b"{", b"}", b":", b",", b"ramp(", b"..", b" ", b"ties("),
        *(b"density=", b"?", b"-", b"9", b".", b"_", b"\xc3\xa9"),
    ),
    "json": (
        *(b'{"adapters":[', b'{"name":"a"},', b'"weight":', b"{", b"}", b"[", b"]", b",", b'"', b"9", b"e", b"-"),
        *(b'{"ramp":[', b'"method":"', b"1,", b"\\u0041", b"null,"),
    ),
}


@pytest.mark.parametrize("reader", FRAGMENTS)
def test_no_drawn_input_keeps_anybody_waiting(reader: str) -> None:
    runs = st.lists(st.tuples(st.sampled_from(FRAGMENTS[reader]), st.sampled_from([1, 1, 1, 2, 30, 4000, MB])))

    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(runs)
    def fuzz(parts: list[tuple[bytes, int]]) -> None:
        check(reader, b"".join(part * min(count, MB // len(part)) for part, count in parts)[:MB])

    fuzz()


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_folder_with_a_bomb_is_refused_at_once(tmp_path: Path, name: str) -> None:
    save(samples.adapter(1), tmp_path / "bad")
    hostile = config(rank_pattern={"(.|.)" * 50 + "x(": 8}) if name == CONFIG else entry(shape=[BIG] * 60_000)
    prefix = b"" if name == CONFIG else struct.pack("<Q", len(hostile))
    (tmp_path / "bad" / name).write_bytes(prefix + hostile)
    with watch() as ticks, pytest.raises(FusionError):
        load(tmp_path / "bad")
    assert ticks.longest_s < LOCK_S


def test_a_misspelled_name_is_looked_up_among_thousands_in_milliseconds() -> None:
    known = [f"{'a' * 56}{number:04}" for number in range(4096)]
    start = time.process_time()
    for _ in range(20):
        assert did_you_mean(f"{'a' * 56}00x1", known).startswith("did you mean 'aaa")
        UnknownAdapterError("b" * 64, known)
    assert (time.process_time() - start) / 40 < 0.02  # 1.6 s before


@pytest.mark.parametrize(
    "value", [10**4000, [1] * 10**6, "x" * 10**6, {str(n): n for n in range(10**5)}, [[[[[[[]]]]]]], ["x" * 10**6] * 99]
)
def test_a_quoted_value_is_short_and_takes_no_time(value: object) -> None:
    times = []
    for _ in range(3):  # a collection of this process's garbage may fall into one
        start = time.process_time()
        assert 0 < len(quote(value)) <= 120
        times.append(time.process_time() - start)
    assert min(times) < 0.01


def test_a_schedules_patterns_are_matched_in_bounded_time() -> None:
    start = time.process_time()
    for pattern in ("*a" * 64, "*" + "?" * 100 + "b", "*?a?b" * 25, "*" * 128, "a" * 128):
        for _ in range(100):
            with contextlib.suppress(FusionError):
                select(pattern, ["a" * 256])
    assert time.process_time() - start < 2


def test_patterns_of_a_recipe_are_matched_as_in_file_names() -> None:
    draw = random.Random(0)
    for _ in range(20_000):
        pattern, name = ("".join(draw.choices(letters, k=draw.randrange(9))) for letters in ("ab?*", "ab"))
        assert bool(select(pattern, [name])) == fnmatch.fnmatchcase(name, pattern), (pattern, name)


def test_the_weights_of_a_recipe_full_of_patterns_are_soon_known() -> None:
    """They took half a minute of a thread: each phase asked each pattern again, character by character."""
    modules = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(100) for kind in "qkv"]
    adapters = {
        name: make_adapter({module: LoraModule(torch.ones(1, 2), torch.ones(2, 1), 1.0) for module in modules}, None)
        for name in "abcdefgh"
    }
    steps = "*: steps(prompt: 0, 0: 1, 1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: 7)"
    patterns = ["*?l" + "?" * number + "z*: 1" for number in range(28)]
    text = " + ".join(f"{{{', '.join([*patterns, steps])}}}*{name}" for name in adapters)
    recipe = parse(text)
    start = time.process_time()
    tables = [tabulate(phase, adapters, same_base=True) for _, phase in recipe.phases()]
    assert time.process_time() - start < TOTAL_S
    assert [set(table.weights.flatten().tolist()) for table in tables] == [{float(number)} for number in range(8)]

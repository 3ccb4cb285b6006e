"""Damaged adapter folders: every one a clear error, nothing crashes, swells or is left behind.

A case is reproducible from its number: `damaged(folder, seed)`.
"""

import json
import math
import os
import random
import re
import resource
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from adapters import AdapterError, load, save
from adapters.cli import main
from tests.adapters.samples import CONFIG, SHAPES, WEIGHTS, adapter

GROWTH = 96 << 20
REASON = re.compile(r"[a-z_]{3,30}")
JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 2**31, 2**63, 1e308, -1.5, "", "x", "é" * 300, [], [1], {}, {"a": {"b": []}}, [[[]]],
)  # fmt: skip


def damaged(folder: Path, seed: int) -> tuple[str, bool]:
    """Spoil a good folder; (the kind of damage, whether no reader could take the result for an adapter)."""
    chance = random.Random(seed)
    kind, certain = chance.choice(KINDS)
    kind(folder, chance)
    return kind.__name__, certain


def _edit_bytes(name: str, change: Callable[[bytearray, random.Random], bytes | bytearray]) -> Callable[..., None]:
    def spoil(folder: Path, chance: random.Random) -> None:
        (folder / name).write_bytes(change(bytearray((folder / name).read_bytes()), chance))

    spoil.__name__ = f"{change.__name__} of {name}"
    return spoil


def cut_short(content: bytearray, chance: random.Random) -> bytearray:
    return content[: chance.randrange(len(content) - 1)]


def noise(content: bytearray, chance: random.Random) -> bytes:
    return chance.randbytes(chance.choice([0, 1, 7, 8, 9, 100, len(content)]))


def flipped(content: bytearray, chance: random.Random) -> bytearray:
    for _ in range(chance.choice([1, 1, 3, 30])):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return content


def spliced(content: bytearray, chance: random.Random) -> bytearray:
    one, two = sorted(chance.randrange(len(content)) for _ in range(2))
    return content[:one] + content[one:two] * 2 + content[two:]


def appended(content: bytearray, chance: random.Random) -> bytes:
    return bytes(content) + chance.randbytes(chance.randint(1, 64))


def wrong_length(content: bytearray, chance: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    others = [0, 1, length - 1, length + 1, length * 2, len(content), 2**26, 2**32, 2**63, 2**64 - 1]
    return struct.pack("<Q", chance.choice(others)) + bytes(content[8:])


def header_entry(folder: Path, chance: random.Random) -> None:
    """A dtype, shape, offset or name that does not fit the rest."""
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = chance.choice([key for key in header if key != "__metadata__"])
    match chance.randrange(5):
        case 0:
            header[name]["dtype"] = chance.choice(["I8", "F8_E4M3", "F64", "F16", "float", "", 4, None])
        case 1:
            header[name]["shape"] = chance.choice([[], [0, 3], [2**40, 2**40], [-1, 3], [1.5], "3", None, [[3]]])
        case 2:
            header[name]["data_offsets"] = chance.choice([[0], [4, 0], [0, 2**50], [-4, 0], [0, 0, 0], None, "0"])
        case 3:
            del header[name][chance.choice(list(header[name]))]
        case _:
            other = chance.choice(["", "lm_head.weight", "a/../../b", "\0", name + "x", "x" * 5000])
            header[other] = header.pop(name)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def spoilt_numbers(folder: Path, chance: random.Random) -> None:
    tensors = load_file(folder / WEIGHTS)
    flat = tensors[chance.choice(sorted(tensors))].view(-1)
    flat[chance.randrange(len(flat))] = chance.choice([math.nan, math.inf, -math.inf])
    save_file(tensors, folder / WEIGHTS)


def lost_tensor(folder: Path, chance: random.Random) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors.pop(chance.choice(sorted(tensors)))
    save_file(tensors, folder / WEIGHTS)


def other_rank(folder: Path, chance: random.Random) -> None:
    """The weights of one adapter with the config of another."""
    save(adapter(2, chance.choice([1, 2, 4, 9])), folder.parent / "other")
    (folder.parent / "other" / WEIGHTS).rename(folder / WEIGHTS)


def _config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / CONFIG).read_text())
    change(content)
    (folder / CONFIG).write_text(json.dumps(content))


def needed_value(folder: Path, chance: random.Random) -> None:
    key = chance.choice(["peft_type", "r", "use_dora", "rank_pattern"])
    fits: dict[str, Callable[[Any], bool]] = {
        "r": lambda junk: junk == 1 and junk is not True,
        "rank_pattern": lambda junk: not junk and junk in ({}, None),
        "use_dora": lambda junk: not junk,
    }
    values = [junk for junk in JUNK if key not in fits or not fits[key](junk)]
    _config(folder, lambda content: content.update({key: chance.choice(values)}))


def any_value(folder: Path, chance: random.Random) -> None:
    def change(content: dict[str, Any]) -> None:
        for _ in range(chance.choice([1, 2, 5])):
            content[chance.choice(sorted(content))] = chance.choice(JUNK)

    _config(folder, change)


def lost_key(folder: Path, chance: random.Random) -> None:
    _config(folder, lambda content: content.pop(chance.choice(["peft_type", "r"])))


def no_json(folder: Path, chance: random.Random) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(
        chance.choice(["", text[:-3], text * 2, f"[{text}]", text.replace(":", ""), text.replace('"', "'"), "\ufeff{"])
    )


def not_a_file(folder: Path, chance: random.Random) -> None:
    name = chance.choice([CONFIG, WEIGHTS])
    (folder / name).unlink()
    if chance.random() < 0.5:
        (folder / name).mkdir()


KINDS: list[tuple[Callable[..., None], bool]] = [
    (_edit_bytes(WEIGHTS, cut_short), True),
    (_edit_bytes(CONFIG, cut_short), True),
    (_edit_bytes(WEIGHTS, noise), True),
    (_edit_bytes(CONFIG, noise), True),
    (_edit_bytes(WEIGHTS, appended), True),
    (_edit_bytes(WEIGHTS, wrong_length), True),
    (header_entry, True),
    (spoilt_numbers, True),
    (lost_tensor, True),
    (other_rank, True),
    (needed_value, True),
    (lost_key, True),
    (no_json, True),
    (not_a_file, True),
    # A flipped bit may only change a number or a space, a value may not matter.
    (_edit_bytes(WEIGHTS, flipped), False),
    (_edit_bytes(CONFIG, flipped), False),
    (_edit_bytes(WEIGHTS, spliced), False),
    (_edit_bytes(CONFIG, spliced), False),
    (any_value, False),
]


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def read_fully(folder: Path, *, lazy: bool) -> str | None:
    """The reason a folder is refused, None when it is a whole adapter."""
    try:
        found = load(folder, lazy=lazy)
        for module in found.modules:
            assert found.modules[module].a.isfinite().all()
    except AdapterError as error:
        refusal = error
    else:
        return None
    assert REASON.fullmatch(refusal.reason), refusal.reason
    assert 10 < len(str(refusal)) < 1000
    assert "\n" not in str(refusal)
    assert str(folder.parent) not in str(refusal)
    return refusal.reason


def attack(place: Path, refused_wanted: int) -> Counter[str]:
    """Damage folders until so many were refused; how often by which reason."""
    good = place / "good"
    save(adapter(1, dict.fromkeys(SHAPES, 3)), good)
    reasons: Counter[str] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handles = len(os.listdir("/proc/self/fd"))
    seed = 0
    while reasons.total() < refused_wanted:
        case = place / f"case-{seed}"
        (case / "bad").mkdir(parents=True)
        for file in good.iterdir():
            (case / "bad" / file.name).write_bytes(file.read_bytes())
        kind, certain = damaged(case / "bad", seed)
        found = contents(case)
        reason = read_fully(case / "bad", lazy=False)
        assert read_fully(case / "bad", lazy=True) == reason, (seed, kind)
        assert reason is not None or not certain, (seed, kind)
        if reason is not None:
            reasons[reason] += 1
            if seed % 10 == 0:  # the command line: one line, no output folder
                arguments = ["fuse", "x", "--adapter", f"x={case / 'bad'}", "--out", str(case / "out")]
                assert main(arguments) == 2, (seed, kind)
        assert contents(case) == found, (seed, kind)
        seed += 1
    assert len(os.listdir("/proc/self/fd")) == handles
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < GROWTH
    return reasons


def test_every_damaged_folder_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reasons = attack(tmp_path, 300)
    assert {"truncated", "not_safetensors", "bad_config", "nan", "shape", "missing_weights"} <= set(reasons)
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines)


@pytest.mark.soak
def test_thousands_of_damaged_folders(tmp_path: Path) -> None:
    assert attack(tmp_path, 3000).total() == 3000

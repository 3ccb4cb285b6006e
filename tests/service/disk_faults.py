"""Faults of disks and files that happen to a `Victim`: each has been undone when it returns, but for changed bytes."""

import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from adapters.files import WEIGHTS
from tests.service.faults import SPELL_S, Fault
from tests.service.victims import Victim

DISK_BYTES = 64 * 2**20


@contextmanager
def mount_disk(folder: Path) -> Iterator[Path]:
    """A small disk for a data folder, in which the builds lie on a mount of their own: it can be made read-only."""
    folder.mkdir()
    data, builds = folder / "data", folder / "data/builds"
    _run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder))
    try:
        builds.mkdir(parents=True)
        _run("mount", "--bind", str(builds), str(builds))
        try:
            yield data
        finally:
            _run("umount", "-l", str(builds))
    finally:
        _run("umount", "-l", str(folder))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def fill_disk(victim: Victim, draw: random.Random) -> None:
    """Leave no byte on the disk for a while, in which much is asked for that has to be written."""
    ballast = victim.data.parent / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    with suppress(OSError), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(512))
    try:
        _demand(victim, draw)
    finally:
        ballast.unlink()


def lock_builds(victim: Victim, draw: random.Random) -> None:
    """Make the disk of stacks and builds read-only for a while."""
    builds = str(victim.data / "builds")
    _run("mount", "-o", "remount,bind,ro", builds)
    try:
        _demand(victim, draw)
    finally:
        _run("mount", "-o", "remount,bind,rw", builds)


def _demand(victim: Victim, draw: random.Random) -> None:
    """Ask for new builds for `SPELL_S`."""
    until = time.monotonic() + SPELL_S
    while time.monotonic() < until:
        body = victim.subjects[0].body() | {"model": f"svd({draw.uniform(0.1, 1):.5f}*a + 1*d, rank=5)"}
        body.pop("fusion", None)
        with suppress(httpx.HTTPError):
            answer = victim.ask(body)
            victim.statuses[answer.status_code] += 1
            if answer.status_code != 200:
                victim.note(answer, "a build on a disk that takes nothing")
        time.sleep(0.1)


def lock_data(victim: Victim, draw: random.Random) -> None:
    """Start on a data folder that is read-only: it must say so, and end."""
    victim.kill()
    data = str(victim.data)
    _run("mount", "--bind", data, data)
    try:
        _run("mount", "-o", "remount,bind,ro", data)
        _expect_end(victim, "cannot be written")
    finally:
        _run("umount", "-l", data)


def _expect_end(victim: Victim, sentence: str) -> None:
    victim.start()
    assert victim.process is not None
    code = victim.process.wait(120)
    said = victim.read_end()
    if code not in (1, 2) or sentence not in said:
        victim.faults.append(f"ended with {code} and {said!r}, expected {sentence!r}")
    victim.ends.append(said)
    victim.process = None


def _flip(file: Path, draw: random.Random, count: int) -> None:
    """Change bytes of a file."""
    content = bytearray(file.read_bytes())
    for at in draw.sample(range(len(content)), min(count, len(content))):
        content[at] ^= draw.randrange(1, 256)
    file.write_bytes(content)


def flip_build(victim: Victim, draw: random.Random) -> None:
    """Change bytes of stacks and builds, and kill all: they must be made again."""
    stored = sorted((victim.data / "builds").glob("*/adapter/*")) + sorted(
        (victim.data / "builds").glob("*/report.json")
    )
    for file in draw.sample(stored, min(4, len(stored))):
        _flip(file, draw, 5)
    victim.kill()


def flip_adapter(victim: Victim, draw: random.Random) -> None:
    """Change bytes of an adapter's files, kill all, and mend it as the error says."""
    name = draw.choice("acde")
    digest = str(victim.send("GET", f"/v1/adapters/{name}").raise_for_status().json()["digest"])
    file = victim.data / "adapters" / digest / "adapter" / WEIGHTS
    victim.kill()
    _flip(file, draw, 7)
    victim.keep_up()
    deadline, card = time.monotonic() + 60, dict[str, object]()
    while card.get("state") != "damaged" and time.monotonic() < deadline:  # it is looked for after the start
        card = victim.send("GET", f"/v1/adapters/{name}").json()
        time.sleep(0.1)
    body = victim.subjects[0].body() | {"model": f"svd({draw.uniform(0.1, 1):.5f}*{name} + 1*b, rank=3)"}
    body.pop("fusion", None)
    answer = victim.ask(body)
    if answer.status_code != 500 or "damaged" not in answer.text or "register" not in answer.text:
        victim.faults.append(f"{name} is damaged ({card}), and is answered {answer.status_code} {answer.text[:300]}")
    mended = victim.send("POST", "/v1/adapters", json={"name": name, "path": str(victim.kit.adapters[name])})
    if mended.status_code != 200:
        victim.faults.append(f"mending {name}: {mended.status_code} {mended.text[:300]}")


def flip_registry(victim: Victim, draw: random.Random) -> None:
    """Change bytes of the registry, start on it, and put back a copy, as an operator would from a backup."""
    victim.is_damaged = True
    victim.kill()
    kept = victim.folder / "kept-registry"
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    parts = sorted(victim.data.glob("registry.sqlite*"))
    for part in parts:
        shutil.copy2(part, kept)
    chosen = [part for part in parts if part.stat().st_size and part.suffix in (".sqlite", ".sqlite-wal")]
    _flip(draw.choice(chosen), draw, 40)
    victim.start()
    assert victim.process is not None
    _wait_ready_or_ended(victim)
    if victim.process.poll() is not None:
        said = victim.read_end()
        if "registry" not in said:
            victim.faults.append(f"a damaged registry: ended with {victim.process.poll()} and {said!r}")
        victim.ends.append(said)
    else:
        _ask_damaged(victim)
    victim.kill()
    victim.process = None
    for part in victim.data.glob("registry.sqlite*"):
        part.unlink()
    for part in kept.iterdir():
        shutil.copy2(part, victim.data)
    victim.is_damaged = False


def _wait_ready_or_ended(victim: Victim) -> None:
    assert victim.process is not None
    deadline = time.monotonic() + 120
    while victim.process.poll() is None and time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            if victim.send("GET", "/readyz", 5).status_code == 200:
                return
        time.sleep(0.1)


def _ask_damaged(victim: Victim) -> None:
    """Of a registry that can still be read, what is not damaged is as it once was, and nothing else is answered: a row
    with other bytes is known by its checksum.
    """
    for number in range(len(victim.profiles)):
        with suppress(httpx.HTTPError):
            answer = victim.ask(victim.find_body("profile", number))
            if answer.status_code == 200:  # of any time: the log's last changes may be those that cannot be read
                victim.check("profile", number, answer, began=0)


DISK: dict[Fault, int] = {
    fill_disk: 4,
    lock_builds: 3,
    lock_data: 1,
    flip_build: 3,
    flip_adapter: 3,
    flip_registry: 3,
}
"""Faults of a server with a disk and a registry of its own."""

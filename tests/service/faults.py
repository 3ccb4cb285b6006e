"""Faults that happen to a `Victim`: each function makes one, and has undone it when it returns."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx

from adapters.files import WEIGHTS
from tests.service.databases import Postgres
from tests.service.proofs import size
from tests.service.source_servers import Handler, files, share, start_body, tag
from tests.service.victims import Victim

Fault = Callable[[Victim, random.Random], None]
OUTAGE_S = size(30, 6)
SPELL_S = 3.0
"""How long a disk stays full or read-only."""
CLOCK_FILE = "clock"


def _signal(pid: int, number: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        if pid:
            os.kill(pid, number)


def kill_core(victim: Victim, draw: random.Random) -> None:
    """Kill the engine."""
    _signal(victim.find("EngineCore"))


def kill_worker(victim: Victim, draw: random.Random) -> None:
    """Kill the process that answers."""
    _signal(victim.find("worker.service"))


def kill_supervisor(victim: Victim, draw: random.Random) -> None:
    """Kill the process that watches the worker."""
    _signal(victim.find("bentoml"))


def kill_server(victim: Victim, draw: random.Random) -> None:
    """Kill the first process, and so all."""
    victim.kill()


def kill_in_build(victim: Victim, draw: random.Random) -> None:
    """Kill all while something new is built and something is uploaded."""
    recipe = f"ties({draw.uniform(0.1, 1):.5f}*a + {draw.uniform(0.1, 1):.5f}*d, density=0.5)"
    body = victim.subjects[0].body() | {"model": recipe}
    body.pop("fusion", None)

    def ask() -> None:
        with suppress(httpx.HTTPError):
            victim.ask(body)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    time.sleep(draw.uniform(0, 0.15))
    victim.kill()
    thread.join(90)


def jump_clock(victim: Victim, draw: random.Random) -> None:
    """Set the clock forward or back, by seconds to years, and then right again."""
    seconds = draw.choice((-1, 1)) * 10 ** draw.uniform(1, 8)
    clock = victim.folder / CLOCK_FILE
    clock.write_text(f"{seconds}")
    time.sleep(SPELL_S)
    if draw.random() < 0.5:
        kill_worker(victim, draw)
        victim.keep_up()
    clock.write_text("0")
    time.sleep(0.5)


def stall_source(victim: Victim, draw: random.Random) -> None:
    """Fetch an adapter from a source that stops in the middle; kill all or wait, and let it go on."""
    contents, release = files(victim.kit.adapters["e"]), threading.Event()
    half = len(contents[WEIGHTS]) // 2

    def answer(handler: Handler) -> None:
        if handler.path.endswith(WEIGHTS) and not release.is_set():
            start_body(handler, content_length=str(len(contents[WEIGHTS])), etag=tag(contents[WEIGHTS]))
            handler.wfile.write(contents[WEIGHTS][:half])
            handler.wfile.flush()
            release.wait(120)
        else:
            share({f"/e/{name}": content for name, content in contents.items()})(handler)

    name = f"fetched-{draw.randrange(10**6)}"
    assert victim.source is not None
    victim.source.answer = answer
    try:
        began = victim.send("POST", "/v1/adapters", json={"name": name, "source": f"{victim.source.url}/e"})
        if began.status_code != 202:
            victim.note(began, "a fetch")
            return
        time.sleep(draw.uniform(0.2, 2))
        refused = victim.ask(victim.guest_body(name))
        if refused.status_code == 200:
            victim.faults.append("an adapter of which a half has come is served")
        if draw.random() < 0.5:
            victim.kill()
            victim.keep_up()
    finally:
        release.set()
    _wait_fetched(victim, name)
    victim.send("DELETE", f"/v1/adapters/{name}")


def _wait_fetched(victim: Victim, name: str) -> None:
    deadline = time.monotonic() + 60
    card: dict[str, Any] = {}
    while "digest" not in card:
        card = victim.send("GET", f"/v1/adapters/{name}").json()
        if card.get("state") == "failed" or time.monotonic() > deadline:
            victim.faults.append(f"a stalled source: {card}")
            return
        time.sleep(0.2)


def stop_database(postgres: Postgres) -> Fault:
    """The fault `end_database` of this one."""

    def end_database(victim: Victim, draw: random.Random) -> None:
        """End the database, and start it again later."""
        with postgres.stopped():
            _ride_out(victim, draw)

    return end_database


def stall_database(postgres: Postgres) -> Fault:
    """The fault `freeze_database` of this one."""

    def freeze_database(victim: Victim, draw: random.Random) -> None:
        """Have the database answer nothing for a while."""
        with postgres.stalled():
            _ride_out(victim, draw)

    return freeze_database


def _ride_out(victim: Victim, draw: random.Random) -> None:
    """What is known must be answered during an outage, and changes be refused."""
    time.sleep(OUTAGE_S / 2)
    for number in draw.sample(range(len(victim.subjects)), 3):
        answer = victim.ask(victim.subjects[number].body())
        if answer.status_code != 200:
            victim.faults.append(f"without its database: {answer.status_code} {answer.text[:300]}")
    refused = victim.send("PUT", "/v1/fusions/outage", json={"fusion": "1*a"})
    if refused.status_code != 503 or "retry-after" not in refused.headers:
        victim.faults.append(f"a change without a database: {refused.status_code} {refused.text[:300]}")
    time.sleep(OUTAGE_S / 2)


COMMON: dict[Fault, int] = {
    kill_core: 3,
    kill_worker: 3,
    kill_supervisor: 2,
    kill_server: 3,
    kill_in_build: 4,
    jump_clock: 3,
    stall_source: 3,
}
"""Faults of every server, and how often each is drawn."""

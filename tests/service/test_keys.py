"""API keys: what opens and what does not, over time, restarts and a leaked database."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
from anyio.to_thread import run_sync
from sqlalchemy import Connection, select, text
from starlette.datastructures import Headers

from service import key_ring, keys as keys_module
from service.callers import KEY, Caller
from service.errors import ApiError
from service.key_records import hash_secret, make_secret, parse_moment, parse_span, write_time
from service.key_ring import check_keyless
from service.keys import Keys, write_token
from service.registry import Registry
from service.settings import Settings
from service.tables import KEYS
from tests.service.databases import Postgres
from tests.service.rings import make_keys

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("time_limit")]


@asynccontextmanager
async def opened(url: str, *operator_keys: str, shared: bool = False) -> AsyncIterator[Keys]:
    registry = await run_sync(partial(Registry, url, timeout_s=5, shared=shared))
    try:
        yield make_keys(registry, Settings(), *operator_keys)
    finally:
        registry.close()


@contextmanager
def later(monkeypatch: pytest.MonkeyPatch, **span: float) -> Iterator[None]:
    """The block runs as if this much time had gone by."""
    with monkeypatch.context() as patch:
        for module in (key_ring, keys_module):
            patch.setattr(module, "read_now", lambda: write_time(datetime.now(UTC) + timedelta(**span)))
        yield


def identify(keys: Keys, token: str, header: str = "authorization") -> Caller | None:
    return keys.ring.identify(Headers({header: f"Bearer {token}" if header == "authorization" else token}))


async def test_a_server_without_keys_asks_for_none_and_with_the_first_one_for_it(url: str) -> None:
    async with opened(url) as keys:
        assert identify(keys, "none") == keys.ring.identify(Headers()) == Caller()
        with pytest.raises(ApiError, match="first key must be an admin's"):
            await keys.create("deployer")
        key, secret = await keys.create("admin", label="first")
        assert keys.ring.identify(Headers()) is None
        token = write_token(key, secret)
        assert identify(keys, token) == identify(keys, token, "x-api-key") == Caller(key.id, "admin", "")
        other = write_token(*await keys.create("user", tenant="acme"))
        assert identify(keys, other) == Caller(other[3:15], "user", "acme")
        mixed = [token.replace(key.id, other[3:15]), token[:-1], f"{token}A", f" {other}x", "", "none", key.hash]
        mixed += [f"lf-{key.id}-{key.hash}", f"lf-{key.id}-{key.hash[:43]}", token.upper(), f"lf-{key.id}-", secret]
        assert {identify(keys, wrong) for wrong in mixed} == {None}
        assert keys.ring.identify(Headers({"authorization": f"Basic {token}"})) is None


async def test_keys_outlive_a_restart_and_their_end_opens_nothing(url: str) -> None:
    async with opened(url) as keys:
        key, secret = await keys.create("admin")
    token = write_token(key, secret)
    async with opened(url) as keys:
        assert identify(keys, token) is not None
        await keys.revoke(key.id)
        await keys.revoke(key.id)  # what has ended stays as it is
        assert identify(keys, token) is keys.ring.identify(Headers()) is None
        with pytest.raises(ApiError, match=f"The key {key.id} is revoked"):
            await keys.rotate(key.id, timedelta(0))
    async with opened(url) as keys:
        assert identify(keys, token) is keys.ring.identify(Headers()) is None
        with pytest.raises(ApiError, match="No key has the id"):
            await keys.revoke("0" * 12)


async def test_a_key_ends_when_it_should(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(url) as keys:
        await keys.create("admin")
        token = write_token(*await keys.create("user", expires=parse_moment("2h")))
        with later(monkeypatch, minutes=119):
            assert identify(keys, token) is not None
        with later(monkeypatch, minutes=121):
            assert identify(keys, token) is None
        with pytest.raises(ApiError, match="which is over"):
            await keys.create("user", expires="2020-01-01T00:00:00+00:00")


async def test_a_rotated_key_s_old_secret_is_taken_for_its_grace_alone(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(url) as keys:
        key, secret = await keys.create("admin")
        first = write_token(key, secret)
        second = write_token(*await keys.rotate(key.id, timedelta(hours=1)))
        assert identify(keys, first) == identify(keys, second) is not None
        with later(monkeypatch, minutes=61):
            assert identify(keys, first) is None
            assert identify(keys, second) is not None
        third = write_token(*await keys.rotate(key.id, timedelta(hours=1)))
        assert identify(keys, first) is None, "the one from before the last rotation"
        assert identify(keys, second) == identify(keys, third) is not None
        fourth = write_token(*await keys.rotate(key.id, timedelta(0)))
        assert [identify(keys, old) for old in (second, third)] == [None, None]
        assert identify(keys, fourth) is not None
        with pytest.raises(ApiError, match="at most 90 days"):
            await keys.rotate(key.id, timedelta(days=91))


async def test_a_leaked_database_opens_nothing(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    async with opened(f"sqlite:///{path}") as keys:
        tokens = [write_token(*await keys.create("admin")) for _ in range(3)]
        tokens.append(write_token(*await keys.rotate(tokens[0][3:15], timedelta(hours=1))))
        assert None not in {identify(keys, token) for token in tokens}
        await keys.ring.record_now()
        content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
        assert not [token for token in tokens if token[16:].encode() in content]
        with closing(sqlite3.connect(path)) as connection:
            rows = connection.execute("SELECT * FROM keys").fetchall()
            rows += connection.execute("SELECT * FROM audit").fetchall()
        values = {str(value) for row in rows for value in row} | {row[0] for row in rows}
        ids = [token[3:15] for token in tokens]
        tries = values | {f"lf-{id_}-{value}"[:n] for id_ in ids for value in values for n in (59, 80)}
        assert {identify(keys, text) for text in tries} == {None}


async def test_vllm_s_keys_are_admins_and_have_ids_of_their_own(url: str) -> None:
    async with opened(url, "left", "right") as keys:
        assert keys.ring.identify(Headers()) is identify(keys, "") is identify(keys, "vllm-1") is None
        assert (identify(keys, "left"), identify(keys, "right")) == (Caller("vllm-1"), Caller("vllm-2"))
        assert (await keys.create("user"))[0].role == "user"  # an admin there is


async def test_every_check_compares_as_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[str, str]] = []

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return one == other

    async with opened(f"sqlite:///{tmp_path / 'r.sqlite'}", "left", "right") as keys:
        key, _ = await keys.create("admin")
        await keys.rotate(key.id, timedelta(hours=1))
        monkeypatch.setattr(key_ring, "compare_digest", compare)
        numbers = set()
        for id_ in (key.id, "0" * 12):
            identify(keys, f"lf-{id_}-{'x' * 43}")
            numbers.add(len(compared))
            compared.clear()
        assert numbers == {4}, "two secrets and vLLM's two keys, for known and unknown ids alike"
        identify(keys, "left")
        assert len(compared) == 2, "no end at the first that fits"
        assert all(len(text) == 64 for pair in compared for text in pair), "hashes alone"


async def test_uses_are_written_in_the_background_once_and_no_check_asks_the_database(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(url) as keys:
        tokens = [write_token(*await keys.create("admin")) for _ in range(3)]
        calls = 0
        transact = keys.registry.transact

        async def count(call: object) -> object:
            nonlocal calls
            calls += 1
            return await transact(call)  # type: ignore[arg-type]  # any

        monkeypatch.setattr(keys.registry, "transact", count)
        monkeypatch.setattr(key_ring, "RECORD_S", 0.05)
        changes = await transact(lambda connection: connection.execute(text("SELECT changes FROM registry")).scalar())
        for _ in range(100):
            identify(keys, tokens[0])
        identify(keys, "lf-" + tokens[1][3:15] + "-" + "x" * 43)
        assert calls == 0
        recording = asyncio.create_task(keys.ring.record())
        while not calls:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        recording.cancel()
        assert calls == 1, "what is written is not written again"

        def read(connection: Connection) -> list[tuple[str, str | None]]:
            return [(row.id, row.used) for row in connection.execute(select(KEYS.c.id, KEYS.c.used))]

        used = dict(await transact(read))
        assert used[tokens[0][3:15]] is not None
        assert used[tokens[1][3:15]] is None, "a wrong secret is no use"
        assert (await keys.read_uses()).keys() == {tokens[0][3:15]}
        now = await transact(lambda connection: connection.execute(text("SELECT changes FROM registry")).scalar())
        assert now == changes, "replicas need not read all again for it"


async def test_replicas_learn_of_keys_and_of_their_end(postgres: Postgres) -> None:
    with postgres.fresh() as url:
        async with opened(url, shared=True) as one, opened(url, shared=True) as other:
            key, secret = await one.create("admin")
            await other.registry.settle()
            assert identify(other, write_token(key, secret)) is not None
            await other.revoke(key.id)
            await one.registry.settle()
            assert identify(one, write_token(key, secret)) is None


async def test_a_row_that_cannot_be_read_opens_nothing_and_locks_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    async with opened(f"sqlite:///{path}") as keys:
        token = write_token(*await keys.create("admin"))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE keys SET role = 'god'")
    async with opened(f"sqlite:///{path}") as keys:
        assert identify(keys, token) is keys.ring.identify(Headers()) is None
        assert "god" in keys.registry.snapshot.damaged_keys[token[3:15]]
        assert (await keys.create("admin"))[0].role == "admin"


async def test_keys_that_have_ended_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "MAX_KEYS", 3)
    async with opened(f"sqlite:///{tmp_path / 'r.sqlite'}") as keys:
        made = [(await keys.create("admin"))[0].id for _ in range(3)]
        with pytest.raises(ApiError, match="There are 3 keys, the limit"):
            await keys.create("user")
        await keys.revoke(made[1])
        await keys.create("user")
        assert made[1] not in keys.registry.snapshot.keys
        assert len(keys.registry.snapshot.keys) == 3


async def test_secrets_are_random_and_kept_as_hashes() -> None:
    assert hash_secret("x") == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    secrets = {make_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(KEY.fullmatch(f"lf-{'0' * 12}-{secret}") for secret in secrets)


@pytest.mark.parametrize("text", ["", "90", "d", "-1d", "90 d", "1e9d", "2027-01-31", "2027-01-31T12:00:00", "soon"])
async def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_moment(text)


async def test_times_are_utc() -> None:
    assert parse_moment("2027-01-31T12:00:00+02:00") == "2027-01-31T10:00:00+00:00"
    assert parse_span("90m") == timedelta(hours=1.5)
    with pytest.raises(ValueError, match="too far away"):
        parse_moment("999999999d")


@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        ({"host": "127.0.0.1"}, True),
        ({"host": "::1"}, True),
        ({"host": "localhost"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"host": "fusion.lan"}, False),
        ({"host": "0.0.0.0", "keyless": True}, True),
        ({"host": "0.0.0.0", "engine_args": ("--api-key", "x")}, True),
        ({"host": "0.0.0.0", "engine_args": ("--api-key=x",)}, True),
    ],
)
async def test_a_server_without_keys_listens_on_loopback_alone(
    settings: dict[str, object], starts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    made = Settings(**settings)  # type: ignore[arg-type]  # the values of all fields, mixed
    async with opened(f"sqlite:///{tmp_path / 'r.sqlite'}") as keys:
        if starts:
            check_keyless(made, has_keys=keys.registry.snapshot.has_keys)
        else:
            with pytest.raises(RuntimeError, match="is not a loopback address, and there is no API key"):
                check_keyless(made, has_keys=keys.registry.snapshot.has_keys)
            await keys.create("admin")
            check_keyless(made, has_keys=keys.registry.snapshot.has_keys)

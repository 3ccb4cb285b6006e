"""The check of API keys: the registry's, all of them in memory, and vLLM's own (`--api-key`), which are admins'."""

import asyncio
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from hmac import compare_digest

from sqlalchemy import Connection, bindparam, or_, update
from starlette.datastructures import Headers

from service.callers import KEY, OPERATOR_KEY, Caller
from service.edge.access import is_loopback
from service.engine.base_folder import has_flag
from service.errors import ApiError
from service.key_records import hash_secret, write_time
from service.registry import Registry
from service.settings import Settings
from service.tables import KEYS

log = logging.getLogger("fusion")

RECORD_S = 60.0
"""How often it is written when keys were used."""
NO_HASH = "0" * 64
"""Stands in for the hash of a key that does not exist, so that an unknown id takes as long; no secret hashes to it."""


def check_keyless(settings: Settings, *, has_keys: bool) -> None:
    """Log what a server without keys means; RuntimeError when it would listen on other addresses than loopback.
    `has_keys`: whether its registry has some.
    """
    if has_keys or has_operator_key(settings):
        return
    if settings.keyless:
        log.warning("no API key, FUSION_KEYLESS=true: whoever reaches %s may do everything", settings.host)
    elif is_loopback(settings.host):
        log.warning("no API key: whoever uses this machine may do everything, and other addresses are not answered")
    else:
        raise RuntimeError(
            f"FUSION_HOST={settings.host!r} is not a loopback address, and there is no API key: make one with "
            "`lora-fusion keys create --offline --role admin`, or set VLLM_API_KEY; FUSION_KEYLESS=true lets whoever "
            "reaches the port do everything"
        )


def has_operator_key(settings: Settings) -> bool:
    """Whether vLLM will have a key of its own, before its flags are parsed."""
    return bool(os.environ.get("VLLM_API_KEY")) or has_flag(settings.engine_args, "--api-key")


def read_token(headers: Headers) -> str:
    """The key in a request's head, empty without one: OpenAI's clients send a bearer token, Anthropic's `x-api-key`."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()


def read_now() -> str:
    """The time as keys have it."""
    return write_time(datetime.now(UTC))


class KeyRing:
    """All keys of a server. A check costs no query: it looks at the registry's snapshot, as all requests do."""

    def __init__(self, registry: Registry, operator_keys: Sequence[str] = ()) -> None:
        """`operator_keys` are vLLM's, as plain text."""
        self._registry = registry
        self._operator = [hash_secret(key) for key in operator_keys]
        self._used: dict[str, str] = {}
        """When keys were used that is not written yet, by id."""

    @property
    def is_asked(self) -> bool:
        """Whether requests need a key: as soon as there has ever been one, so that the last one's end opens nothing."""
        return bool(self._operator) or self._registry.snapshot.has_keys

    @property
    def has_admin(self) -> bool:
        """Whether anybody can administer this server."""
        at = read_now()
        keys = self._registry.snapshot.keys.values()
        return bool(self._operator) or any(key.role == "admin" and key.find_state(at) == "active" for key in keys)

    def identify(self, headers: Headers) -> Caller | None:
        """Who sends a request with these headers; None for a missing or wrong key."""
        if not self.is_asked:
            return Caller()
        token = read_token(headers)
        match = KEY.fullmatch(token)
        found = self._find(match[1], match[2]) if match else None
        return found or self._find_operator(token)

    def _find(self, id_: str, secret: str) -> Caller | None:
        key, at = self._registry.snapshot.keys.get(id_), read_now()
        hashes = key.list_hashes(at) if key is not None else ()
        given, is_right = hash_secret(secret), False
        for kept in (*hashes, NO_HASH, NO_HASH)[:2]:  # as much work for an unknown id
            is_right |= compare_digest(given, kept)
        if key is None or not is_right:
            return None
        self._used[id_] = at
        return key.caller

    def _find_operator(self, token: str) -> Caller | None:
        given, number = hash_secret(token), 0
        for i, kept in enumerate(self._operator, 1):
            number += i * compare_digest(given, kept) * (not number)
        return Caller(f"{OPERATOR_KEY}{number}") if token and number else None

    def last_use(self, id_: str) -> str | None:
        """When a key was used here that the database does not know yet."""
        return self._used.get(id_)

    async def record(self) -> None:
        """Write from time to time when keys were used, until cancelled; no request waits for it."""
        while True:
            await asyncio.sleep(RECORD_S)
            with suppress(ApiError):  # the database does not answer: next time
                await self.record_now()

    async def record_now(self) -> None:
        """Write when keys were used; 503 when the database does not answer."""
        used = dict(sorted(self._used.items()))  # as every replica: rows that two of them lock in turn
        if not used:
            return
        rows = [{"key": id_, "at": at} for id_, at in used.items()]
        is_older = or_(KEYS.c.used.is_(None), KEYS.c.used < bindparam("at"))  # another replica may know more
        query = update(KEYS).where(KEYS.c.id == bindparam("key"), is_older).values(used=bindparam("at"))

        def write(connection: Connection) -> None:
            connection.execute(query, rows)

        await self._registry.transact(write)
        for id_, at in used.items():
            if self._used.get(id_) == at:
                del self._used[id_]

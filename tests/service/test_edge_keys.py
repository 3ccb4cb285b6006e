"""The edge's check of keys: who it is for, from where, and how many wrong ones there may be."""

import logging
from typing import Any

import pytest

from service.callers import Caller, Role
from service.edge.guesses import MAX_CLIENTS, MAX_GUESSES, WINDOW_S, Guesses
from service.edge.keys import RequireKey
from tests.service.edge_app import check, identify_right


@pytest.mark.parametrize(("role", "status"), [("user", 403), ("deployer", 403), ("admin", 200)])
def test_metrics_are_for_admins(role: Role, status: int) -> None:
    assert check(RequireKey, identify=lambda _: Caller("k", role)).get("/metrics").status_code == status
    assert (
        check(RequireKey, identify=lambda _: Caller("k", role), public_metrics=True).get("/metrics").status_code == 200
    )


async def test_without_a_key_loopback_alone_is_answered(anyio_backend: str) -> None:
    for keyless, server, status in (
        (False, "127.0.0.1", 200),
        (False, "::1", 200),
        (False, "::ffff:127.0.0.1", 200),
        (False, "192.0.2.1", 403),
        (True, "192.0.2.1", 200),
    ):
        http = check(RequireKey, keyless=keyless)
        http = type(http)(http.app, base_url=f"http://[{server}]" if ":" in server else f"http://{server}")
        assert http.get("/v1/models").status_code == status, (keyless, server)
        assert http.get("/readyz").status_code == 200


def test_one_client_may_try_ten_wrong_keys_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "fusion")
    now = [1000.0]
    monkeypatch.setattr("service.edge.guesses.time.monotonic", lambda: now[0])
    good = Caller("0f3a5c7e9b1d", "user")
    http = check(
        RequireKey,
        identify=lambda headers: good if headers.get("authorization") == "Bearer good" else identify_right(headers),
    )

    def ask(token: str | None) -> Any:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        return http.get("/v1/models", headers=headers)

    for _ in range(3 * MAX_GUESSES):
        assert ask(None).status_code == 401, "no key is no guess"
    for i in range(MAX_GUESSES):
        assert ask(f"wrong {i}").status_code == 401
        assert ask("right").status_code == 200 or i == MAX_GUESSES - 1
    now[0] += 20
    refused = ask("wrong")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "40")
    assert refused.json()["error"]["type"] == "RateLimitError"
    assert ask("right").status_code == 429, "vLLM's keys may be short: the right one is not told from a wrong one"
    assert ask("good").status_code == 200, "256 bits cannot be guessed: others behind the address are not shut out"
    assert http.get("/readyz").status_code == 200
    assert [record.getMessage() for record in caplog.records] == [
        "client name testclient sent 10 wrong API keys within a minute"
    ]
    now[0] += 41
    assert ask("right").status_code == 200
    assert ask("wrong").status_code == 401


def test_guesses_of_few_clients_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    guesses = Guesses()
    for i in range(MAX_CLIENTS + 100):
        guesses.count(str(i))
    assert len(guesses._clients) == MAX_CLIENTS  # noqa: SLF001 - it shows nowhere else
    for _ in range(MAX_GUESSES):
        guesses.count("one")
    assert 0 < guesses.wait_s("one") <= WINDOW_S
    assert guesses.wait_s("other") == 0

"""Requests of this project's own commands to a running server."""

import os
from collections.abc import Iterator
from typing import Any

import httpx

from service.settings import CLIENT_KEY

DEFAULT_URL = "http://127.0.0.1:3000"
TIMEOUT_S = 60.0


class AnswerError(RuntimeError):
    """The server cannot be reached or refuses; the message is its own."""


def ask(url: str, method: str, path: str, **options: Any) -> Any:
    """The JSON of an answer, None without a body; the API key comes from `FUSION_API_KEY`. Raises AnswerError."""
    key = os.environ.get(CLIENT_KEY)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.request(method, f"{url.rstrip('/')}{path}", headers=headers, timeout=TIMEOUT_S, **options)
        if answer.is_success:
            return answer.json() if answer.content else None
        message = answer.json()["error"]["message"]
    except httpx.HTTPError as error:
        raise AnswerError(f"{url} does not answer: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise AnswerError(f"{url} answers {answer.status_code}, and not as this service does") from error
    hint = f"; put an admin's key into {CLIENT_KEY}" if answer.status_code in (401, 403) else ""
    raise AnswerError(f"{message}{hint}")


def ask_pages(url: str, path: str) -> Iterator[dict[str, Any]]:
    """All entries of a list that has pages."""
    after: str | None = ""
    while after is not None:
        page = ask(url, "GET", path, params={"limit": 1000} | ({"after": after} if after else {}))
        yield from page["data"]
        after = page["last_id"] if page["has_more"] else None

"""One OpenAI-compatible endpoint: its models, and what a fusion service says about a recipe.

A fusion service also answers `plan` (identity of a recipe, and whether it is mixed or built) and keeps scorecards;
any other endpoint has neither, and the clients do without.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import httpx
from inspect_ai.model import GenerateConfig, Model, get_model
from openai import AsyncOpenAI

PROVIDER = "openai-api/fusion/"
"""Inspect's name for a model of an OpenAI-compatible service, before the model's own."""


class EndpointError(RuntimeError):
    """The endpoint cannot be used: says what was asked, what came back, and what to do."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to ask. ``base_url`` ends in /v1; ``timeout`` (seconds) bounds one attempt of one request."""

    base_url: str
    api_key: str = "none"
    timeout: int = 600

    def client(self) -> AsyncOpenAI:
        """The stock client, retrying as it does by default."""
        return AsyncOpenAI(base_url=self.base_url, api_key=self.api_key, timeout=self.timeout)

    def model(self, name: str) -> Model:
        """`name` (model, profile or recipe) as Inspect's model. All models of an endpoint share its connections;
        Inspect does the retrying, the client below it none.
        """
        config = GenerateConfig(attempt_timeout=self.timeout)
        made = get_model(
            PROVIDER + name,
            base_url=self.base_url,
            api_key=self.api_key,
            config=config,
            memoize=False,
            max_retries=0,
        )
        setattr(made.api, "connection_key", lambda: self.base_url)  # noqa: B010 - else a limit for each model
        return made

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        """A request to a route that is no OpenAI route; EndpointError when no answer comes."""
        headers = {"authorization": f"Bearer {self.api_key}"}
        try:
            with httpx.Client(base_url=self.base_url.rstrip("/"), headers=headers, timeout=self.timeout) as client:
                return client.request(method, path, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EndpointError(
                f"no answer from {self.base_url!r} ({error}); start a service with: make serve"
            ) from None

    def models(self) -> list[dict[str, Any]]:
        """What the endpoint lists, the base first."""
        answer = self.ask("GET", "/models")
        try:
            found = answer.json()["data"]
        except (ValueError, KeyError, TypeError):
            raise EndpointError(
                f"{self.base_url}/models gives no list of models (status {answer.status_code}); does it end in /v1?"
            ) from None
        if not found:
            raise EndpointError(f"{self.base_url!r} serves no model")
        return list(found)

    def base(self) -> str:
        """The first model listed: a fusion service lists its base first."""
        return str(self.models()[0]["id"])

    def adapters(self) -> list[str]:
        """The adapters of a fusion service by name; none of any other endpoint."""
        answer = self.ask("GET", "/adapters")
        return [str(one["name"]) for one in answer.json()["data"]] if answer.is_success else []

    def fuses(self) -> bool:
        """Whether a fusion service answers here."""
        return self.ask("GET", "/fusions").is_success


@dataclass(frozen=True, slots=True)
class Plan:
    """What a fusion service says of a recipe before it is served."""

    digest: str
    mixed: bool
    recipe: str
    rank: int
    error: float

    @classmethod
    def of(cls, endpoint: Endpoint, recipe: str) -> Self:
        """The service's plan for `recipe`; EndpointError when it refuses it."""
        answer = endpoint.ask("POST", "/fusions/plan", json={"fusion": recipe})
        if answer.is_error:
            raise EndpointError(f"{recipe!r} is refused: {message_of(answer)}")
        body = answer.json()
        return cls(body["digest"], body["mode"] == "mixed", body["recipe"], body["rank"], body["error"])


def publish(endpoint: Endpoint, digest: str, made: Mapping[str, str], measures: Mapping[str, Any]) -> bool:
    """Attach a scorecard to a fusion's digest, unless one with these measures is there; EndpointError when the service
    refuses it.
    """
    there = endpoint.ask("GET", f"/scorecards/{digest}")
    cards = there.json()["data"] if there.is_success else []
    if any(measures.items() <= card.items() for card in map(dict, cards)):
        return False
    answer = endpoint.ask("POST", f"/scorecards/{digest}", json={**made, **measures})
    if answer.is_error:
        raise EndpointError(f"the scorecard of {digest[:12]} is refused: {message_of(answer)}")
    return True


def message_of(answer: httpx.Response) -> str:
    """The sentence of an error answer."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} {answer.text[:200]}"

"""One OpenAI-compatible endpoint: its models, and what a fusion service says about a recipe.

A fusion service also answers `plan` (identity of a recipe, and whether it is mixed or built) and keeps scorecards;
other endpoints have neither, and the clients work without them.
"""

import json
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
from inspect_ai.model import GenerateConfig, Model, get_model
from inspect_ai.util import store
from openai import AsyncOpenAI

from eval_clients.errors import EndpointError

PROVIDER = "openai-api/fusion/"
"""Inspect's provider prefix of a model at an OpenAI-compatible service."""
SENT_MODEL = "fusion_model"
"""Key of a sample's store, followed by a model's name: the model to ask in its place, for this sample."""
CHOICE = "fusion_choice"
"""Key of a sample's store, followed by a model's name: what a fusion service said about its answer (`read_choice`)."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a fusion service says about a recipe before it is served."""

    digest: str
    mixed: bool
    recipe: str
    error: float
    """Relative Frobenius error of the served update; 0 when mixed, as all recipes with phases are."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address, key and timeout. `base_url` ends in /v1; `timeout` (seconds) bounds one attempt of one request."""

    base_url: str
    api_key: str = "none"
    timeout: int = 600

    def client(self) -> AsyncOpenAI:
        """The stock client, with its default retries."""
        return AsyncOpenAI(base_url=self.base_url, api_key=self.api_key, timeout=self.timeout)

    def model(self, name: str) -> Model:
        """`name` (model, profile or recipe) as Inspect's model. All models of an endpoint share its connections;
        Inspect does the retrying, the client below it none.
        """
        model = get_model(
            PROVIDER + name,
            base_url=self.base_url,
            api_key=self.api_key,
            config=GenerateConfig(attempt_timeout=self.timeout),
            memoize=False,
            max_retries=0,
        )
        setattr(model.api, "connection_key", lambda: self.base_url)  # noqa: B010 - otherwise Inspect limits connections per model
        setattr(model.api, "service_model_name", lambda: str(store().get(SENT_MODEL + name, name)))  # noqa: B010 - one log, many models
        model.api.http_client.event_hooks["response"].append(keep_choice(name))  # type: ignore[attr-defined]  # this provider's
        return model

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request to a route outside the OpenAI API; EndpointError when no answer comes."""
        headers = {"authorization": f"Bearer {self.api_key}"}
        try:
            with httpx.Client(base_url=self.base_url.rstrip("/"), headers=headers, timeout=self.timeout) as client:
                return client.request(method, path, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EndpointError(
                f"no answer from {self.base_url!r} ({error}); check --base-url, or start a service with `make serve`"
            ) from None

    def models(self) -> list[dict[str, Any]]:
        """What the endpoint lists, the base first."""
        response = self.request("GET", "/models")
        try:
            models = list(response.json()["data"])
        except (ValueError, KeyError, TypeError):
            raise EndpointError(
                f"{self.base_url}/models returned no list of models (status {response.status_code}); "
                "expected a base URL that ends in /v1: check --base-url"
            ) from None
        if not models:
            raise EndpointError(f"{self.base_url!r} serves no models; load one, or give another --base-url")
        return models

    def base(self) -> str:
        """The first model listed: a fusion service lists its base first."""
        return str(self.models()[0]["id"])

    def adapters(self) -> list[str]:
        """The names of a fusion service's adapters; empty for any other endpoint."""
        return [str(adapter["name"]) for adapter in self._entries("/adapters")]

    def answer_only(self) -> frozenset[str]:
        """The names of those of a fusion service's adapters that act on the answer alone."""
        return frozenset(str(adapter["name"]) for adapter in self._entries("/adapters") if adapter.get("answer_only"))

    def page(self) -> str:
        """Where a fusion service has its page."""
        return self.base_url.rstrip("/").removesuffix("/v1") + "/"

    def is_fusion_service(self) -> bool:
        """Whether a fusion service answers here."""
        return self.request("GET", "/fusions").is_success

    def plan(self, recipe: str) -> Plan:
        """The service's plan for `recipe`; EndpointError when the service rejects it."""
        response = self.request("POST", "/fusions/plan", json={"fusion": recipe})
        if response.is_error:
            raise EndpointError(f"the service rejected {recipe!r}: {error_message(response)}")
        body = response.json()
        return Plan(body["digest"], body["mode"] == "mixed", body["recipe"], body.get("error", 0.0))

    def publish(self, plan: Plan, provenance: Mapping[str, Any], measures: Mapping[str, Any]) -> bool:
        """Attach a scorecard to a fusion's digest, unless one that says the same exists. Returns True if attached.

        EndpointError when the service rejects it.
        """
        path = f"/scorecards/{plan.digest}"
        own = {**provenance, **measures}
        same = {key: value for key, value in own.items() if key != "command"}  # which says how often it was resumed
        if any(same.items() <= card.items() for card in self._entries(path)):
            return False
        # The service keeps scorecards of fusions that it can name: the recipe says which this is.
        response = self.request("POST", path, json={**own, "fusion": plan.recipe})
        if response.is_error:
            raise EndpointError(f"the service rejected the scorecard of {plan.digest[:12]}: {error_message(response)}")
        return True

    def _entries(self, path: str) -> Iterator[dict[str, Any]]:
        """Fetch all entries of one of the service's lists, page by page; nothing if the server lacks the route."""
        after: dict[str, str] = {}
        while (response := self.request("GET", path, params=after)).is_success:
            body = response.json()
            yield from body["data"]
            if not body.get("has_more"):
                return
            after = {"after": body["last_id"]}


class HasHeaders(Protocol):
    """A response of any HTTP library."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Values by name, in any case."""
        ...


def keep_choice(model: str) -> Callable[[HasHeaders], Awaitable[None]]:
    """What keeps the weights that a fusion service says it ran for `model` in the sample's store."""

    async def keep(response: HasHeaders) -> None:
        if choice := read_choice(response.headers):
            store().set(CHOICE + model, choice)

    return keep


def read_choice(headers: Mapping[str, str]) -> dict[str, Any]:
    """`weights` that ran, by adapter, and `gate`: whether a gate chose them (`chose`, or `default` when it failed).

    Empty where the headers of an answer do not say.
    """
    weights = parse_weights(headers.get("x-fusion-weights", ""))
    return {"weights": weights, "gate": headers.get("x-fusion-gate", "").partition(":")[0]} if weights else {}


def parse_weights(text: str) -> dict[str, float]:
    """The finite numbers of a JSON object, by name; empty for any other text."""
    try:
        weights = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(weights, dict):
        return {}
    return {
        name: float(value)
        for name, value in weights.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def error_message(response: httpx.Response) -> str:
    """The sentence in an error response, or its status and first 200 characters."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.text[:200]}"

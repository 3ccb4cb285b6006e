"""vLLM's routes that this server has, each with its reason; all others are removed from vLLM's app.

Another vLLM may mount more, and so do some of its flags: what is not listed here does not exist.
"""

from fastapi import FastAPI
from starlette.routing import BaseRoute

from service.engine.supported import UnknownVllmError

SERVED = {
    ("POST", "/v1/chat/completions"): "OpenAI's chat",
    ("POST", "/v1/chat/completions/batch"): "several conversations in one request",
    ("POST", "/v1/completions"): "OpenAI's completions",
    ("POST", "/v1/responses"): "OpenAI's responses",
    ("POST", "/v1/messages"): "Anthropic's chat",
    ("POST", "/v1/messages/count_tokens"): "Anthropic's count of a prompt's tokens",
    ("POST", "/v1/chat/completions/render"): "a chat's tokens, for routers that send equal prompts to one replica",
    ("POST", "/v1/completions/render"): "the same for completions",
    ("POST", "/tokenize"): "a prompt's tokens",
    ("POST", "/detokenize"): "the text of tokens",
    ("GET", "/health"): "vLLM's health check, for its users' load balancers",
    ("GET", "/ping"): "the same under another name",
    ("GET", "/version"): "vLLM's version, which clients choose features by",
    ("GET", "/load"): "requests in progress, for vLLM's own routers",
}
"""(method, path) → reason."""

OPTIONAL = {("GET", "/tokenizer_info"): "--enable-tokenizer-info-endpoint"}
"""vLLM's routes that are served as well when the operator sets the flag: (method, path) → flag."""

UNSERVED = {
    ("GET", "/docs"): "one page describes this server's own routes, too",
    ("GET", "/docs/oauth2-redirect"): "as above",
    ("GET", "/redoc"): "as above",
    ("GET", "/openapi.json"): "one document describes this server's own routes, too",
    ("GET", "/metrics"): "BentoML's route has the same series",
    ("", "/metrics"): "as above",
    ("GET", "/v1/models"): "an own route lists adapters and profiles, too",
    ("GET", "/v1/responses/{response_id}"): "answers are not kept",
    ("POST", "/v1/responses/{response_id}/cancel"): "as above",
    ("POST", "/ping"): "health checks read",
    ("POST", "/invocations"): "one route for all bodies: the gate cannot tell which",
    ("POST", "/generative_scoring"): "no OpenAI route, and not tried with fusions",
    ("POST", "/v1/systemone"): "as above",
    ("POST", "/scale_elastic_ep"): "an operator's switch",
    ("POST", "/is_scaling_elastic_ep"): "as above",
    ("GET", "/kv_event_sources"): "for an operator's cache routers",
    ("POST", "/v1/messages/render"): "parts of disaggregated serving",
    ("POST", "/v1/responses/render"): "as above",
    ("POST", "/v1/chat/completions/derender"): "as above",
    ("POST", "/v1/completions/derender"): "as above",
    ("POST", "/inference/v1/generate"): "as above",
    ("POST", "/inference/v1/abort_requests"): "as above",
}
"""What vLLM mounts for a text model besides, and why it is not served; a test compares both tables with its app."""


def route_keys(route: BaseRoute) -> set[tuple[str, str]]:
    """The (method, path) pairs of a route; the method of a mount is empty, HEAD is what GET takes."""
    methods: set[str] = getattr(route, "methods", None) or {""}
    return {(method, getattr(route, "path", "")) for method in methods if method != "HEAD"}


def keep_served(app: FastAPI) -> None:
    """Remove every route of vLLM's `app` that is not listed; `UnknownVllmError` when a listed one is missing."""
    remaining = [route for route in app.routes if route_keys(route) <= SERVED.keys() | OPTIONAL.keys()]
    if missing := SERVED.keys() - {key for route in remaining for key in route_keys(route)}:
        raise UnknownVllmError(f"vLLM's app has no {min(missing)}: install the pins in requirements/")
    app.router.routes[:] = remaining

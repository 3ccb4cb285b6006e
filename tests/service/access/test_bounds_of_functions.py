"""A bound on an adapter's weight holds on the real server for recipes of every form, on every route."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import BASE_NAME, ROOT
from tests.service.access.conftest import ASK, GUARD, LEAST, Served

REFUSED = (
    "0.2*guard + 1*task",
    "0.5*guard + -0.3*own + 1*task",  # one content by two names
    "ramp(0.2..0.6)*guard",
    "{*.mlp.*: 0.2, *: 0.6}*guard + 1*task",
    "{*.nothing.*: 0.2, *: 0.6}*guard",
    "{*.mlp.*: fade(1..0, 8), *: ramp(0.3..0.6)}*guard",
    "[1, 1, 1, 1, 1, 1, 1, 0.2]*guard",
    "steps(prompt: 0.4, 0: 1, 4: 0.2)*guard + 1*task",
    "steps(0: 1)*guard",
    "steps(prompt: 1, 900: 0.2)*guard",
    "fade(1..0.2, 8)*guard",
    "answer(1*guard + 0.5*task)",
    "gate(1*task + 0.4*guard, by=watch, guard in 0.2..0.8)",
    "gate(answer(1*task + 0.4*guard), by=watch, guard in 0.3..0.8)",
    "slerp(1*guard + 1*task, t=0.9, from=guard)",
    "svd(1*guard + 1*task, rank=4)",
    "ties(1*guard + 1*task, density=0.5)",
)
SERVED = (
    "1*task",
    "0.3*guard + 1*task",
    "0.2*guard + 0.1*own + 1*task",
    "ramp(0.3..0.6)*guard",
    "{*.mlp.*: 0.3, *: 0.6}*guard + 1*task",
    "[1, 1, 1, 1, 1, 1, 1, 0.3]*guard",
    "steps(prompt: 0.4, 0: 1, 4: 0.3)*guard + 1*task",
    "fade(1..0.3, 8)*guard",
    "gate(1*task + 0.4*guard, by=watch, guard in 0.3..0.8)",
    "slerp(1*guard + 1*task, t=0.5, from=guard)",
)
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": ASK,
    "/v1/chat/completions/batch": ASK | {"messages": [ASK["messages"]]},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 2},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 2},
    "/v1/messages": {"messages": ASK["messages"], "max_tokens": 2},
    "/tokenize": {"prompt": "Hi"},
}


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[httpx.Client]:
    """A tenant's user, for whom there are the guard and a gate; the tenant names the guard's content, too."""
    folders = {GUARD: "safety", "watch": "risk"}
    with served.client() as operator:
        for name, folder in folders.items():
            body = {"name": name, "path": str(ROOT / "examples/adapters" / folder)}
            operator.post("/v1/adapters", json=body).raise_for_status()
        with served.client("acme", "user") as user:
            yield user
        for name in folders:
            operator.delete(f"/v1/adapters/{name}").raise_for_status()


@pytest.mark.parametrize("recipe", REFUSED)
def test_what_undercuts_a_bound_is_answered_nowhere(http: httpx.Client, recipe: str) -> None:
    for path, body in ROUTES.items():
        by_field: dict[str, Any] = {"model": BASE_NAME, "fusion": recipe, "stream": True}
        for names in ({"model": recipe}, by_field):
            answer = http.post(path, json=body | names)
            assert (answer.status_code, "rule 'range-1' refuses" in answer.text) == (403, True), (path, answer.text)
            assert f"at least {LEAST}" in answer.text
            assert "x-fusion-source" not in answer.headers
    plan = http.post("/v1/fusions/plan", json={"fusion": recipe})
    if plan.is_success:  # some forms are refused as such by a plan, too
        assert (plan.json()["policy"]["allowed"], plan.json()["policy"]["rule"]) == (False, "range-1")


@pytest.mark.parametrize("recipe", SERVED)
def test_what_keeps_it_is_answered(http: httpx.Client, recipe: str) -> None:
    answer = http.post("/v1/chat/completions", json=ASK | {"model": recipe})
    assert answer.status_code == 200, answer.text
    if "gate" in recipe:
        assert '"guard": ' in answer.headers["x-fusion-weights"]

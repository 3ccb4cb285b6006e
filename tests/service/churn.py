"""Recipes of every form, and clients that ask, change, upload, delete and leave: for `test_churn`."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.service.tiny import ADAPTERS, GATE

Recipe = str | dict[str, Any]
TOKENS = 4
TOLERANCE = 1e-3
"""Between log-probabilities of an answer alone and in a batch, which float32 rounds otherwise; other weights change
them by hundredths at least.
"""


def _weight(draw: random.Random) -> str:
    return f"{draw.choice((-1, 1)) * draw.uniform(0.2, 1):.3f}"


def _sum(draw: random.Random, count: int = 2) -> str:
    return " + ".join(f"{_weight(draw)}*{name}" for name in draw.sample(sorted(ADAPTERS), count))


def _around(method: str, options: str = "") -> Callable[[random.Random], str]:
    """Recipes of a method around a sum of two or three."""
    return lambda draw: f"{method}({_sum(draw, draw.choice((2, 3)))}{options})"


def _pair(form: str) -> Callable[[random.Random], str]:
    """Recipes `form` of two adapters, {x} and {y}, and of weights, {u}, {v} and {w}."""

    def make(draw: random.Random) -> str:
        x, y = draw.sample(sorted(ADAPTERS), 2)
        return form.format(x=x, y=y, u=_weight(draw), v=_weight(draw), w=_weight(draw))

    return make


def _components(draw: random.Random) -> str:
    x, y = draw.sample(sorted(ADAPTERS), 2)
    return f"[{', '.join(_weight(draw) for _ in range(ADAPTERS[x][0]))}]*{x} + {_weight(draw)}*{y}"


def _json(draw: random.Random, **options: Any) -> Recipe:
    terms = [{"name": name, "weight": float(_weight(draw))} for name in draw.sample(sorted(ADAPTERS), 2)]
    return {"adapters": terms, **options}


FORMS: Mapping[str, Callable[[random.Random], Recipe]] = {
    "alone": lambda draw: draw.choice(sorted(ADAPTERS)),
    "sum": lambda draw: _sum(draw, draw.choice((2, 3, 4))),
    "ramp": _pair("{u}*{x} + ramp(0.2..0.9)*{y}"),
    "modules": _pair("{u}*{x} + {{*.mlp.*: {v}, *: {w}}}*{y}"),
    "steps": _pair("{u}*{x} + steps(prompt: {v}, 0: {w}, 2: {u})*{y}"),
    "fade": _pair("{u}*{x} + fade(1..0.2, 4)*{y}"),
    "answer": lambda draw: f"answer({_sum(draw)})",
    "components": _components,
    "gate": _pair(f"gate({{u}}*{{x}} + {{v}}*{{y}}, by={GATE}, {{y}} in -1..1)"),
    "svd": _around("svd", ", rank=4"),
    "ties": _around("ties", ", density=0.5"),
    "dare_linear": _around("dare_linear", ", density=0.5, seed=7"),
    "dare_ties": _around("dare_ties", ", density=0.5, seed=3"),
    "della": _around("della", ", density=0.6"),
    "breadcrumbs": _around("breadcrumbs", ", density=0.9"),
    "knots": _around("knots", ", density=0.8"),
    "slerp": _pair("slerp({u}*{x} + {v}*{y}, t=0.3, from={x})"),
    "peft_svd": _around("peft_svd"),
    "JSON sum": _json,
    "JSON svd": lambda draw: _json(draw, method="svd", rank=6),
}


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its tokens, their log-probabilities, and the digest of the fusion that gave it."""

    tokens: tuple[int, ...]
    values: tuple[float, ...]
    digest: str

    def differs(self, other: "Answer") -> bool:
        """Whether the weights were others; where two tokens are as likely, the answers part without that."""
        steps = zip(self.tokens, self.values, other.tokens, other.values, strict=True)
        for token, value, other_token, other_value in steps:
            if abs(value - other_value) > TOLERANCE:
                return True
            if token != other_token:
                return False
        return False


@dataclass(frozen=True)
class Subject:
    """A recipe with its prompt, as a request has them; `strict` where it loses nothing."""

    form: str
    recipe: Recipe
    prompt: Sequence[int]
    strict: bool = False

    def body(self, **more: Any) -> dict[str, Any]:
        """The request's."""
        named = {"model": self.recipe} if isinstance(self.recipe, str) else {"fusion": self.recipe}
        return make_body(self.prompt, **named, **({"strict": True} if self.strict else {}), **more)


def make_body(prompt: Sequence[int], **more: Any) -> dict[str, Any]:
    """Of a request for a greedy answer."""
    asked = {"prompt": list(prompt), "max_tokens": TOKENS, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    return {**asked, "return_token_ids": True, **more}


def make_subjects(draw: random.Random, count: int, prompt: Callable[[random.Random], list[int]]) -> list[Subject]:
    """Different recipes of all forms in turn."""
    subjects: dict[str, Subject] = {}
    while len(subjects) < count:
        form = list(FORMS)[len(subjects) % len(FORMS)]
        recipe = FORMS[form](draw)
        if form == "alone" and str(recipe) in subjects:
            recipe = f"{_weight(draw)}*{recipe}"
        subjects.setdefault(
            str(recipe), Subject(form, recipe, prompt(draw), strict=form == "sum" and draw.random() < 0.5)
        )
    return list(subjects.values())


def read_answer(answer: httpx.Response) -> Answer:
    """What a 200 says."""
    choice = answer.json()["choices"][0]
    values = choice["logprobs"]["token_logprobs"][-TOKENS:]
    return Answer(tuple(choice["token_ids"][-TOKENS:]), tuple(values), answer.headers.get("x-fusion-digest", ""))


@dataclass
class Version:
    """What a profile was made to say: which subject, and when that was asked for and acknowledged (seconds)."""

    subject: int
    began: float
    ended: float = float("inf")


@dataclass
class History:
    """All that one profile was made to say, one after the other; some of it was never acknowledged."""

    versions: list[Version] = field(default_factory=list)

    def between(self, began: float, ended: float) -> set[int]:
        """The subjects that an answer between these moments may be of."""
        possible, until = set(), float("inf")
        for version in reversed(list(self.versions)):
            if version.began <= ended and until >= began:
                possible.add(version.subject)
            until = min(until, version.ended)
        return possible

"""The rules of a policy, as its file states them: which adapters must, may and may not be combined, by whom."""

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, ValidationError, field_validator, model_validator

from adapters.recipes import METHODS, check_name, did_you_mean
from service.callers import ROLES, Caller, Role
from service.policy_file import LIMITS, policy_fault, read_policy_file
from service.records import HexDigest
from service.validation import StrictModel

Least = Role | Literal["nobody"]
"""The role that is needed at least."""
Tokens = Literal["all", "answer"]
MAX_RULES = 256
ID = r"^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}$"
SHORT_ID = 12
"""Digits of a policy's id that are enough to tell policies apart."""


def is_enough(caller: Caller, least: Least) -> bool:
    """Whether the caller has the role that is needed."""
    return least in ROLES and caller.may(least)  # type: ignore[arg-type]  # "nobody" is none of them


class Rule(StrictModel):
    """What all rules of a list have."""

    id: str = Field(default="", pattern=ID, description="by default made from its place, such as `floor-1`")


class BoundRule(Rule):
    """A rule about one adapter's weight: what is registered publicly under its name, and the contents in `also`."""

    adapter: str
    also: list[HexDigest] = Field(default=[], description="digests of further contents, such as those of before")
    tokens: Tokens = Field(default="all", description="whether it holds in the prompt, too, or in the answer alone")

    @field_validator("adapter")
    @classmethod
    def _check_adapter(cls, name: str) -> str:
        return check_name(name)


class Floor(BoundRule):
    """An adapter that every fusion must have, with at least this weight everywhere."""

    at_least: FiniteFloat = Field(gt=0)


class Range(BoundRule):
    """Between which weights an adapter must be everywhere, in the fusions that have it."""

    at_least: FiniteFloat | None = None
    at_most: FiniteFloat | None = None

    @model_validator(mode="after")
    def _check_range(self) -> "Range":
        if self.at_least is None and self.at_most is None:
            raise ValueError("expected 'at_least', 'at_most' or both")
        if self.low > self.high:
            raise ValueError(f"'at_least' = {self.low:g} is over 'at_most' = {self.high:g}")
        return self

    @property
    def low(self) -> float:
        """The lowest weight."""
        return float("-inf") if self.at_least is None else self.at_least

    @property
    def high(self) -> float:
        """The highest weight."""
        return float("inf") if self.at_most is None else self.at_most


class Apart(Rule):
    """Adapters and gates of which no two may be in one recipe."""

    adapters: list[str] = Field(min_length=2)


class Inline(StrictModel):
    """The least role of those who send recipes of their own, in a request or for a profile."""

    recipes: Least = "user"
    schedules: Least = Field(default="user", description="weights by layer, module, component or position")
    gates: Least = "user"
    negative: Least = Field(default="user", description="weights below 0")


class BaseRule(StrictModel):
    """The least role of those who ask the base alone; by default nobody where there is a floor."""

    role: Least | None = None


class EvidenceRule(Rule):
    """What the newest scorecard of exactly a fusion's digest must show before a profile with it answers."""

    limit: str = Field(pattern=r"^\s*\w+\s*(<=|>=)\s*-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$", examples=["harm <= 0.05"])
    keys: list[str] = Field(min_length=1, description="ids of the API keys whose scorecards count; '': without a key")
    max_age_days: Annotated[FiniteFloat, Field(gt=0)] | None = None
    profiles: str = Field(default="*", description="which profiles it is about, with `*` and `?`")

    @property
    def measure(self) -> str:
        """What is limited."""
        return self.limit.replace("<=", ">=").partition(">=")[0].strip()

    def holds(self, value: float) -> bool:
        """Whether the limit is kept."""
        sign, bound = ("<=" if "<=" in self.limit else ">="), float(self.limit.partition("=")[2])
        return value <= bound if sign == "<=" else value >= bound


class Rules(StrictModel):
    """A policy. What it does not state, everybody may."""

    name: str = Field(default="", max_length=128)
    exempt: Least = Field(default="nobody", description="the least role that no rule is about")
    adapters: list[str] | None = Field(default=None, description="the only ones, with gates, that fusions may have")
    methods: list[str] | None = Field(default=None, description="the only ones that fusions may have")
    floor: list[Floor] = Field(default=[], max_length=MAX_RULES)
    apart: list[Apart] = Field(default=[], max_length=MAX_RULES)
    range: list[Range] = Field(default=[], max_length=MAX_RULES)
    inline: Inline = Inline()
    base: BaseRule = BaseRule()
    evidence: list[EvidenceRule] = Field(default=[], max_length=MAX_RULES)

    @field_validator("methods")
    @classmethod
    def _check_methods(cls, methods: list[str] | None) -> list[str] | None:
        for name in methods or ():
            if name not in METHODS:
                hint = did_you_mean(name, METHODS) or f"known are {', '.join(METHODS)}"
                raise ValueError(f"unknown method {name!r}: {hint}")
        return methods

    @model_validator(mode="after")
    def _number_rules(self) -> "Rules":
        known = {"inline", "base", "adapters", "methods"}
        for kind, number, rule in self._lists():
            rule.id = rule.id or f"{kind}-{number}"
            if rule.id in known:
                raise ValueError(f"the id {rule.id!r} is taken: every rule has one of its own")
            known.add(rule.id)
        return self

    def _lists(self) -> Iterator[tuple[str, int, Rule]]:
        for kind in ("floor", "apart", "range", "evidence"):
            yield from ((kind, number, rule) for number, rule in enumerate(getattr(self, kind), 1))

    @property
    def base_role(self) -> Least:
        """The least role of those who ask the base alone."""
        return self.base.role or ("nobody" if self.floor else "user")

    def ids(self) -> list[str]:
        """Of all rules that there are."""
        stated = [kind for kind in ("adapters", "methods") if getattr(self, kind) is not None]
        stated += ["inline"] if self.inline != Inline() else []
        stated += ["base"] if self.base_role != "user" else []
        return stated + [rule.id for _, _, rule in self._lists()]

    def list_adapters(self) -> dict[str, list[str]]:
        """The adapters and gates that rules name, each with the ids of these rules, by name."""
        found = {name: ["adapters"] for name in self.adapters or ()}
        for _, _, rule in self._lists():
            names = rule.adapters if isinstance(rule, Apart) else [rule.adapter] if isinstance(rule, BoundRule) else []
            for name in names:
                found.setdefault(name, []).append(rule.id)
        return dict(sorted(found.items()))

    def list_rules(self) -> list[dict[str, Any]]:
        """All rules as JSON, each with its id and kind."""
        rules: list[dict[str, Any]] = [
            {"id": kind, "kind": kind, kind: names}
            for kind, names in (("adapters", self.adapters), ("methods", self.methods))
            if names is not None
        ]
        if "inline" in self.ids():
            rules.append({"id": "inline", "kind": "inline", **self.inline.model_dump()})
        if "base" in self.ids():
            rules.append({"id": "base", "kind": "base", "role": self.base_role})
        return rules + [{"kind": kind, **rule.model_dump()} for kind, _, rule in self._lists()]

    def digest(self) -> str:
        """SHA-256 of the content, 64 hexadecimal digits: the same however the file is written."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, allow_nan=False)
        return hashlib.sha256(f"policy/1/{text}".encode()).hexdigest()


def read_rules(path: str) -> Rules:
    """The policy in the file at `path`; without one, no rules. SettingsError says where it is at fault."""
    tables = {name: table for name, table in read_policy_file(path).items() if name != LIMITS}
    try:
        return Rules.model_validate(tables)
    except ValidationError as error:
        raise policy_fault(path, tables, error) from error

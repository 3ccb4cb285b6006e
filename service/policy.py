"""The policy on combinations: which fusions may answer whom. Checked before anything is built or queued.

Rules name public adapters. They are about contents: those that these names stand for when a request comes.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from itertools import chain

from adapters.recipes import did_you_mean
from service.callers import Caller
from service.errors import ApiError
from service.evidence import Card, Evidence
from service.floors import FloorWeights, group_names
from service.policy_rules import BoundRule, EvidenceRule, Floor, Least, Range, Rules, is_enough
from service.registry import Registry
from service.resolve import Fusion
from service.validation import MAX_QUOTED
from service.weight_bounds import UNKNOWN, Place, Span, list_places

TOLERANCE = 1e-9
"""A weight that misses its bound by less keeps it: those of ramps and fades are rounded."""
NEGLIGIBLE = 1e-6
"""Largest weight that counts as none where the base alone may not answer: in float32 the base's numbers hide it."""
COMPUTES_NOTHING = ("/tokenize", "/detokenize", "/render", "/count_tokens")
"""Ends of the paths that ask no model."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a fusion may answer: the id of the rule that refuses it and why, both empty when none does."""

    rule: str = ""
    reason: str = ""
    rules: tuple[str, ...] = ()
    """Ids of those that allow it."""
    scorecards: tuple[int, ...] = ()
    """Ids of those that it rests on."""
    exempt: bool = False
    """Whether no rule is about the caller."""

    @property
    def allowed(self) -> bool:
        """Whether no rule refuses."""
        return not self.rule


ALLOWED = Verdict()


class Policy:
    """The rules, over what is registered; `max_rank` is the largest rank that is served without truncation."""

    def __init__(
        self, rules: Rules, registry: Registry, *, max_rank: int, record: Callable[[str], None] = lambda _: None
    ) -> None:
        """`record` is told the id of each rule that refuses something."""
        self.rules = rules
        self._record = record
        self.id = rules.digest()
        self.evidence = Evidence(registry, rules.evidence)
        self._registry = registry
        self._max_rank = max_rank
        self._ids = rules.ids()
        self.floor_weights = FloorWeights(rules.floor, registry, self.digests)
        self._used: dict[str, str] = {}
        """When the oldest scorecard was made that a profile rests on, by registered name."""

    async def check(self, fusion: Fusion | None, caller: Caller, *, profile: str = "", path: str = "") -> Verdict:
        """Raise 403, with the rule and what was found and required, unless `fusion` may answer `caller`; None is the
        base alone, on the route `path`. `profile` is the name of one that is to have the fusion.
        """
        if fusion is None and path.endswith(COMPUTES_NOTHING):
            return ALLOWED
        verdict = await self.judge(fusion, caller, profile=profile)
        if not verdict.allowed:
            self._record(verdict.rule)
            message = (
                f"The policy's rule {verdict.rule!r} refuses this: {verdict.reason}. GET /v1/policy lists all rules."
            )
            raise ApiError(403, message, param=None if fusion is None else "fusion" if profile else "model")
        return verdict

    async def judge(self, fusion: Fusion | None, caller: Caller, *, profile: str = "") -> Verdict:
        """As `check`, without raising for what a rule refuses; 503 when evidence is needed and cannot be read."""
        if is_enough(caller, self.rules.exempt):
            return Verdict(exempt=True)
        if not self._ids:
            return ALLOWED
        if fusion is None:
            return next(self._judge_base(caller), Verdict(rules=("base",) if "base" in self._ids else ()))
        places = list_places(fusion.recipe)
        refusals = chain(
            self._judge_parts(fusion),
            self._judge_sender(fusion, places, caller),
            *(self._judge_floor(rule, fusion, places) for rule in self.rules.floor),
            *(self._judge_range(rule, fusion, places) for rule in self.rules.range),
        )
        return next(refusals, None) or await self._judge_evidence(fusion, caller, profile)

    def list_evidence(self) -> list[tuple[tuple[str], float]]:
        """How old the evidence is, in seconds, of each profile that has answered by some; in any thread."""
        now, profiles = datetime.now(UTC), self._registry.profiles
        ages = [(key, (now - datetime.fromisoformat(made)).total_seconds()) for key, made in list(self._used.items())]
        return [((key,), age) for key, age in ages if key in profiles]

    def digests(self, name: str, also: Collection[str] = ()) -> set[str]:
        """The contents that a rule means by an adapter's name."""
        record = self._registry.adapters.get(name)
        return {*also} if record is None else {record.digest, *also}

    def list_warnings(self) -> list[str]:
        """A sentence for each adapter that rules name and that is not registered publicly now: perhaps a slip."""
        public = [record.name for record in self._registry.adapters.values() if not record.tenant]
        warnings = []
        for name, ids in self.rules.list_adapters().items():
            if name not in public:
                hint = did_you_mean(name, public) or "register it, or correct the policy"
                rules = ", ".join(map(repr, ids))
                warnings.append(
                    f"no public adapter has the name {name!r}, which is in the policy's rules {rules}: {hint}"
                )
        return warnings

    def _judge_base(self, caller: Caller) -> Iterator[Verdict]:
        if not is_enough(caller, self.rules.base_role):
            yield Verdict(
                "base", f"the base alone answers {_name_roles(self.rules.base_role)}, and you are {caller.role}"
            )

    def _judge_parts(self, fusion: Fusion) -> Iterator[Verdict]:
        """What may be in one recipe, and by which methods."""
        recipe, allowed = fusion.recipe, self.rules.methods
        if allowed is not None and recipe.method not in allowed:
            yield Verdict("methods", f"the method is {recipe.method!r}, and it must be {' or '.join(allowed)}")
        if (only := self.rules.adapters) is not None:
            contents = {digest for name in only for digest in self.digests(name)}
            for name in recipe.parents:
                if fusion.parents[name] not in contents:
                    yield Verdict("adapters", f"{name!r} is none of {', '.join(only)}, as these are registered now")
        for rule in self.rules.apart:
            present = [one for one in rule.adapters if list_names(fusion, one, self.digests(one))]
            if len(present) > 1:
                yield Verdict(rule.id, f"{present[0]!r} and {present[1]!r} may not be in one recipe")

    def _judge_sender(self, fusion: Fusion, places: Collection[Place], caller: Caller) -> Iterator[Verdict]:
        """What the caller's role lets it write; names of adapters and profiles are written by others."""
        recipe, rules = fusion.recipe, self.rules.inline
        if not any(recipe.magnitudes().values()) or is_negligible(fusion, places):  # the base by another name
            yield from self._judge_base(caller)
        if fusion.profile is not None or self._is_name(fusion):
            return
        stated = [span for place in places for span in place.stated.values()]
        has_schedule = recipe.answer or not all(isinstance(weight, float) for weight in recipe.weights.values())
        for what, least, applies in (
            ("recipes", rules.recipes, True),
            ("schedules", rules.schedules, has_schedule),
            ("gates", rules.gates, recipe.gate is not None),
            ("negative weights", rules.negative, any(low < 0 for low, _ in stated)),
        ):
            if applies and not is_enough(caller, least):
                yield Verdict("inline", f"{what} of one's own are for {_name_roles(least)}, and you are {caller.role}")

    def _is_name(self, fusion: Fusion) -> bool:
        """Whether the recipe is what an adapter's name stands for."""
        recipe = fusion.recipe
        if recipe.method != "sum" or recipe.gate is not None or [*recipe.weights.values()] != [1.0]:
            return False
        records = self._registry.adapters.values() if recipe.answer else ()
        return not recipe.answer or any(r.answer_only and r.digest in fusion.members for r in records)

    def _judge_floor(self, rule: Floor, fusion: Fusion, places: Collection[Place]) -> Iterator[Verdict]:
        required = f"every fusion needs it with at least {rule.at_least:g} {_say_where(rule)}"
        digests = self.digests(rule.adapter, rule.also)
        groups = [names for names in group_names(fusion) if fusion.parents[names[0]] in digests]
        if not groups:
            found = "is missing" if digests else "is not registered"
            yield Verdict(rule.id, f"{rule.adapter!r} {found}; {required}")
            return
        faults = [self._find_fault(rule, names, fusion, places, (rule.at_least, float("inf"))) for names in groups]
        if all(faults):  # with several contents that count, one is enough
            yield Verdict(rule.id, f"{faults[0]}; {required}")

    def _judge_range(self, rule: Range, fusion: Fusion, places: Collection[Place]) -> Iterator[Verdict]:
        named = set(list_names(fusion, rule.adapter, self.digests(rule.adapter, rule.also)))
        low = "" if rule.at_least is None else f"at least {rule.at_least:g}"
        high = "" if rule.at_most is None else f"at most {rule.at_most:g}"
        required = f"it must have {' and '.join(filter(None, (low, high)))} {_say_where(rule)}"
        for names in group_names(fusion):
            if named & {*names} and (fault := self._find_fault(rule, names, fusion, places, (rule.low, rule.high))):
                yield Verdict(rule.id, f"{fault}; {required}")

    def _find_fault(
        self, rule: BoundRule, names: Collection[str], fusion: Fusion, places: Collection[Place], bound: Span
    ) -> str:
        """Where a content, by the names that the recipe has for it, is out of bounds, in words; empty if nowhere."""
        name = min(names)
        if fusion.rank > self._max_rank:
            ranks = f"its adapters' ranks add up to {fusion.rank}, over FUSION_MAX_LORA_RANK={self._max_rank}"
            return f"how much of {name!r} is left is not known, since {ranks}, so that it may be truncated"
        for place in places:
            if rule.tokens == "answer" and not place.in_answer:
                continue
            spans = [place.spans[one] for one in names if one in place.spans]
            if not spans or UNKNOWN in spans:
                return f"how much of {name!r} is left by the method {fusion.recipe.method!r} is not known"
            low, high = sum(low for low, _ in spans), sum(high for _, high in spans)
            wrong = low if low < bound[0] - TOLERANCE else high if high > bound[1] + TOLERANCE else None
            if wrong is not None:
                part = "" if low == high else " in some modules or components"
                where = f"{place}, " if str(place) else ""
                return f"{where}{name!r} has {'any weight' if abs(wrong) == float('inf') else f'{wrong:g}'}{part}"
        return ""

    async def _judge_evidence(self, fusion: Fusion, caller: Caller, profile: str) -> Verdict:
        name = (profile or ("" if fusion.profile is None else fusion.profile.name)).rpartition("|")[2]
        rules = [rule for rule in self.rules.evidence if name and fnmatchcase(name, rule.profiles)]
        cards = await self.evidence.find(fusion.digest, caller.tenant) if rules else []
        used, oldest = set(), ""
        for rule in rules:
            card = find_card(rule, cards, caller)
            if fault := _find_gap(rule, card):
                needed = (
                    f"{fault}; the profile {name!r:.{MAX_QUOTED}} needs {rule.limit!r} on the fusion {fusion.digest}"
                )
                return Verdict(rule.id, needed)
            assert card is not None
            used.add(card.number)
            oldest = min(oldest or card.created, card.created)
        if oldest and fusion.profile is not None:
            if len(self._used) > len(self._registry.profiles):  # some were deleted
                self._used = {key: made for key, made in self._used.items() if key in self._registry.profiles}
            self._used[fusion.profile.key] = oldest
        others = {"base", *(rule.id for rule in self.rules.evidence if rule not in rules)}
        if fusion.profile is not None:
            others.add("inline")
        return Verdict(rules=tuple(i for i in self._ids if i not in others), scorecards=tuple(sorted(used)))


def is_negligible(fusion: Fusion, places: Collection[Place]) -> bool:
    """Whether all that acts of every content, by the names that a recipe has for it, is next to nothing everywhere."""
    sums = (
        sum(place.spans.get(name, (0.0, 0.0))[end] for name in names)
        for place in places
        for names in group_names(fusion)
        for end in (0, 1)
    )
    return all(abs(each) <= NEGLIGIBLE for each in sums)


def list_names(fusion: Fusion, name: str, digests: Collection[str]) -> list[str]:
    """The adapters of a recipe that a rule forbids or limits: those with the name, and those with the content."""
    return [one for one in fusion.recipe.parents if one == name or fusion.parents[one] in digests]


def find_card(rule: EvidenceRule, cards: Collection[Card], caller: Caller) -> Card | None:
    """The newest card that the rule trusts and that has its measure: an operator's, or of the caller's own tenant."""
    tenants = ("", caller.tenant)
    return next((c for c in cards if c.key in rule.keys and c.tenant in tenants and rule.measure in c.measures), None)


def _find_gap(rule: EvidenceRule, card: Card | None) -> str:
    """What is wrong with the evidence, in words; empty when it is enough."""
    if card is None:
        return f"there is no scorecard with {rule.measure!r} by a trusted key"
    value = card.measures[rule.measure]
    if not rule.holds(value):
        return f"scorecard {card.number} has {rule.measure} = {value:g}"
    if rule.max_age_days is not None:
        age = datetime.now(UTC) - datetime.fromisoformat(card.created)
        if age > timedelta(days=rule.max_age_days):
            return f"scorecard {card.number} is of {card.created}, older than {rule.max_age_days:g} days"
    return ""


def _say_where(rule: BoundRule) -> str:
    tokens = "token" if rule.tokens == "all" else "token of the answer"
    return f"at every {tokens}, in every module and at every outcome of a gate"


def _name_roles(least: Least) -> str:
    return {"nobody": "nobody", "user": "users", "deployer": "deployers and admins", "admin": "admins"}[least]

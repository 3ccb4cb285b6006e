"""From what a request says to what it means: the base, or a recipe with its parents' digests."""

import math
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from adapters import Readout, Recipe, RecipeError, check_prompt, from_json, fusion_digest, parse
from adapters.recipes import find_name, name_text
from service.errors import ApiError, damaged_adapter, damaged_profile
from service.forms import plain_name
from service.records import AdapterRecord, ProfileVersion
from service.registry import Registry
from service.spelling import is_name, suggest
from service.tenants import join_key
from service.validation import MAX_QUOTED
from service.views import View

MAX_RECENT = 4096
"""Fusions that were asked for lately, to which a result can be attached without its recipe."""
MAX_MODEL_CHARS = 16_384
"""A recipe's text, which each chunk of an answer repeats: 100 adapters with the longest names."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """A recipe whose adapter names are bound to digests; `label` names it in metrics."""

    recipe: Recipe
    parents: Mapping[str, str]
    """Digest of each adapter, by name."""
    digest: str
    label: str
    profile: ProfileVersion | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Largest rank in any module of each adapter, by digest: two names may share one."""
    built: str = ""
    """Layers of its adapters that are served built, not mixed, for messages; empty when there are none."""
    readout: Readout | None = None
    """How the value of its gate is read."""
    tenant: str = ""
    """Whose names it has; empty when all of them are public."""

    @property
    def rank(self) -> int:
        """Width of its adapters side by side, and of its gate."""
        return sum(self.ranks.values())

    @property
    def members(self) -> set[str]:
        """Digests of the adapters that answers are computed with: all but the gate."""
        return {self.parents[name] for name in self.recipe.adapters}


class Names:
    """The one namespace of base, profiles and adapters as a tenant sees it, and the lookups in it; the operator's, as
    it is made.
    """

    def __init__(self, base: str, registry: Registry, *, max_weight: float, max_norm: float) -> None:
        self.base = base
        self.registry = registry
        self.max_weight = max_weight
        self.max_norm = max_norm
        self.tenant = ""
        self._recent: OrderedDict[str, None] = OrderedDict()

    def view(self, tenant: str) -> "Names":
        """The same as `tenant` sees it."""
        if tenant == self.tenant:
            return self
        names = copy(self)
        names.tenant = tenant
        return names

    @property
    def seen(self) -> View:
        """What the tenant sees of the registry now."""
        return View(self.registry.snapshot, self.tenant)

    def owner(self, name: str) -> str | None:
        """What already has this name, as words ('a profile'), or None."""
        if name == self.base:
            return "the base model"
        seen = self.seen
        for owner, names in (
            ("a profile", seen.profiles),
            ("an adapter", seen.adapters),
            ("a damaged profile", seen.damaged_profiles),
            ("a damaged adapter", seen.damaged_adapters),
        ):
            if name in names:
                return owner
        plain, at, _ = name.partition("@")
        if at and (plain in seen.profiles or plain in seen.damaged_profiles):
            return f"the form of a version of the profile {plain!r}"
        return None

    def not_found(self, kind: str, name: str, known: Collection[str], param: str) -> ApiError:
        """The 404 for a `kind` ('adapter') that is not among the `known`, with the nearest of them."""
        hint = suggest(name, known) or "GET /v1/models lists all names."
        return ApiError(404, f"There is no {kind} {name[:MAX_QUOTED]!r}: {hint}", param=param)

    def profile(self, name: str, *, param: str = "model") -> ProfileVersion:
        """The profile `name`, or one version of it as `name@3`; 404 otherwise."""
        plain, at, version = name.partition("@")
        seen = self.seen
        if not at and plain in seen.profiles:
            return seen.profiles[plain]
        if not at and plain in seen.damaged_profiles:
            raise damaged_profile(plain, seen.damaged_profiles[plain])
        versions = {str(number): pinned for number, pinned in seen.versions.get(plain, {}).items()}
        reasons = {str(number): reason for number, reason in seen.damaged_versions.get(plain, {}).items()}
        if version in reasons:
            raise damaged_profile(name, reasons[version])
        if not versions and not reasons:
            raise self.not_found("profile", plain, seen.profiles, param)
        if version not in versions:
            latest = ", ".join(sorted(versions, key=int)[-8:])
            message = f"Profile {plain!r} has no version {version[:MAX_QUOTED]!r}; it has {latest}."
            raise ApiError(404, message, param=param)
        return versions[version]

    def find_missing(self, version: ProfileVersion) -> str | None:
        """The first adapter of a profile version whose content has no record any more; None when all have one."""
        ranks = self.registry.ranks
        return next((name for name, digest in version.parents.items() if digest not in ranks), None)

    def resolve_profile(self, version: ProfileVersion) -> Fusion:
        """The fusion of a profile version, its parents as pinned; 500 when one of them has no record any more."""
        recipe = parse(version.recipe, max_weight=math.inf)  # the limit was checked when the version was made
        if (missing := self.find_missing(version)) is not None:
            raise damaged_profile(version.name, f"no adapter is registered with the content of its {missing!r}")
        ranks = {digest: self.registry.ranks[digest] for digest in version.parents.values()}
        built, readout = self._list_built(ranks), self._read_gate(recipe, version.parents)
        about = (version, version.defaults, ranks, built, readout, version.tenant)
        return Fusion(recipe, version.parents, version.digest, version.key, *about)

    def resolve_recipe(self, recipe: Recipe, *, text: str = "", param: str = "model") -> Fusion:
        """Bind a recipe's names to the adapters registered now; errors say where in its `text` they stand."""
        adapters, damaged = self.seen.adapters, self.seen.damaged_adapters
        records = []
        for name in recipe.parents:
            self._check_role(recipe, name, text, param)
            if name in damaged:
                raise damaged_adapter(name, damaged[name])
            if name not in adapters:
                raise self.not_found("adapter", name, adapters, param)
            records.append(adapters[name])
        try:
            recipe.check_ranks({record.name: record.rank for record in records})
        except RecipeError as error:
            raise ApiError(400, f"{error}.", param=param) from error
        try:
            check_prompt(recipe, [record.name for record in records if record.answer_only], text)
        except RecipeError as error:
            message = f"{error}; or register it with 'answer_only': false to let it act on prompts, too."
            raise ApiError(400, message, param=param) from error
        return self.bind(recipe, records)

    def _check_role(self, recipe: Recipe, name: str, text: str, param: str) -> None:
        """400 when a recipe has the base, a profile, a gate or an adapter where that cannot be."""
        record, is_gate = self.seen.adapters.get(name), recipe.gate is not None and recipe.gate.by == name
        fault = ""
        if name == self.base:
            fault = "is the base model, which has no weight; a recipe combines adapters only."
        elif name in self.seen.profiles:
            fault = "is a profile; a recipe combines adapters only."
        elif record is not None and is_gate and not record.gate:
            fault = "is an adapter, not a gate; 'lora-fusion train gate' makes one."
        elif record is not None and record.gate and not is_gate:
            fault = f"is a gate, not an adapter: name it in 'gate(…, by={name_text(name)})'."
        if fault:
            position = None if text == name else find_name(name, text)
            place = "" if position is None else f" (at position {position})"
            raise ApiError(400, f"{name!r}{place} {fault}", param=param)

    def bind(self, recipe: Recipe, records: Sequence[AdapterRecord]) -> Fusion:
        """The fusion of `recipe` over the adapters of these records."""
        parents = {record.name: record.digest for record in records}
        ranks = {record.digest: record.rank for record in records}
        digest = fusion_digest(recipe, base=self.base, parents=parents)
        built = next((record.built for record in records if record.built), "")
        readout = next((Readout.from_text(record.gate) for record in records if record.gate), None)
        tenant = next((record.tenant for record in records if record.tenant), "")
        return Fusion(recipe, parents, digest, "(inline)", ranks=ranks, built=built, readout=readout, tenant=tenant)

    def _read_gate(self, recipe: Recipe, parents: Mapping[str, str]) -> Readout | None:
        return Readout.from_text(self.registry.snapshot.gates[parents[recipe.gate.by]]) if recipe.gate else None

    def _list_built(self, digests: Iterable[str]) -> str:
        """The layers that are served built of the first of these adapters that has some."""
        built = self.registry.snapshot.built
        return next((built[digest] for digest in digests if digest in built), "")

    def knows(self, digest: str) -> bool:
        """Whether a fusion that the tenant sees has this digest: an adapter, a version of a profile, or one that it
        asked for lately.
        """
        return self.seen.has_fusion(digest) or join_key(self.tenant, digest) in self._recent

    def look_up(self, text: Any, *, param: str = "model") -> Fusion | None:
        """What `text` names: None for the base, else profile, adapter or recipe, in that order."""
        return self._remember(self._look_up(text, param))

    def _remember(self, fusion: Fusion | None) -> Fusion | None:
        if fusion is not None:
            key = join_key(self.tenant, fusion.digest)
            self._recent[key] = None
            self._recent.move_to_end(key)
            if len(self._recent) > MAX_RECENT:
                self._recent.popitem(last=False)
        return fusion

    def _look_up(self, text: Any, param: str) -> Fusion | None:
        if not isinstance(text, str):
            raise ApiError(400, f"{param!r} must be a string, got {text!r:.{MAX_QUOTED}}.", param=param)
        if (plain := plain_name(self.base, text)) != text and self.owner(text) is None:
            text = plain
        if text == self.base:
            return None
        if not text.strip():
            known = f"{self.base!r}, an adapter, a profile or a recipe; GET /v1/models lists all names"
            raise ApiError(400, f"{param!r} is empty: expected {known}.", param=param)
        if len(text) > MAX_MODEL_CHARS:
            message = f"{param!r} has {len(text)} characters; the limit is {MAX_MODEL_CHARS}."
            raise ApiError(400, message, param=param)
        seen = self.seen
        if text in seen.profiles or text in seen.damaged_profiles:
            return self._check_norm(self.resolve_profile(self.profile(text, param=param)), param)
        if text in seen.adapters or text in seen.damaged_adapters:
            record = seen.adapters.get(text)
            recipe = Recipe.single(text) if record is None else record.recipe
            return self._check_norm(self.resolve_recipe(recipe, param=param), param)
        if "@" in text and is_name(text):
            return self._check_norm(self.resolve_profile(self._version(text, param)), param)
        try:
            recipe = parse(text, max_weight=self.max_weight)
        except RecipeError as error:
            if is_name(text):
                raise self._no_model(text, param) from error
            raise ApiError(400, str(error), param=param) from error
        if len(recipe.terms) == 1 and recipe.is_sum and recipe.adapters[0] == text.strip():
            raise self._no_model(text, param)
        return self._check_norm(self.resolve_recipe(recipe, text=text, param=param), param)

    def _version(self, text: str, param: str) -> ProfileVersion:
        """The profile version `name@3`; 404 for what is none, and for adapters of such a name that are not there."""
        plain, _, version = text.partition("@")
        seen = self.seen
        if plain in seen.versions or plain in seen.damaged_versions:
            return self.profile(text, param=param)
        if version.isdecimal() and not suggest(text, seen.adapters):
            raise self.not_found("profile", plain, seen.profiles, param)
        raise self._no_model(text, param)

    def _no_model(self, text: str, param: str) -> ApiError:
        return self.not_found("model", text, [self.base, *self.seen.profiles, *self.seen.adapters], param)

    def resolve_field(self, value: Any) -> Fusion | None:
        """What the request key `fusion` names: a name, a recipe, or the JSON form of one."""
        if isinstance(value, dict):
            try:
                recipe = from_json(value, max_weight=self.max_weight)
            except RecipeError as error:
                raise ApiError(400, str(error), param="fusion") from error
            return self._remember(self._check_norm(self.resolve_recipe(recipe, param="fusion"), "fusion"))
        if not isinstance(value, str):
            raise ApiError(
                400,
                f"'fusion' must be a profile, a recipe or an object with 'adapters', got {value!r:.{MAX_QUOTED}}.",
                param="fusion",
            )
        return self.look_up(value, param="fusion")

    def _check_norm(self, fusion: Fusion, param: str) -> Fusion:
        """`fusion`; 400 when it is a sum whose weights times the adapters' norms are over what the dtype holds.

        Other methods are checked when their weights are known, or they are built. Profiles and adapters are checked,
        too: the dtype may be another now.
        """
        if fusion.recipe.method == "sum":
            self.check_norm(fusion, fusion.recipe.magnitudes(), param)
        return fusion

    def check_norm(self, fusion: Fusion, weights: Mapping[str, float], param: str = "model") -> None:
        """400 when `weights`, the largest magnitude by adapter, times norms are over what the dtype holds."""
        norms = self.registry.snapshot.norms
        total = sum(weight * norms.get(fusion.parents[name], 0.0) for name, weight in weights.items())
        if not total <= self.max_norm:
            message = (
                f"{fusion.recipe.format()[:MAX_QUOTED]!r} would overflow: its weights times the adapters' norms "
                f"add up to {total:.4g}, but the limit on this server is {self.max_norm:.4g}; use smaller weights."
            )
            raise ApiError(400, message, param=param)

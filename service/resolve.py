"""From what a request says to what it means: the base, or a recipe with its parents' digests."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters import Recipe, RecipeError, did_you_mean, from_json, fusion_digest, parse
from service.errors import ApiError
from service.registry import AdapterRecord, ProfileVersion, Registry
from service.validation import MAX_QUOTED


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

    @property
    def rank(self) -> int:
        """Width of its adapters side by side."""
        return sum(self.ranks.values())


class Names:
    """The one namespace of base, profiles and adapters, and the lookups in it."""

    def __init__(self, base: str, registry: Registry, *, max_weight: float) -> None:
        self.base = base
        self.registry = registry
        self.max_weight = max_weight

    def owner(self, name: str) -> str | None:
        """What already has this name, as words ('a profile'), or None."""
        if name == self.base:
            return "the base model"
        if name in self.registry.profiles:
            return "a profile"
        return "an adapter" if name in self.registry.adapters else None

    def not_found(self, kind: str, name: str, known: Iterable[str], param: str) -> ApiError:
        """The 404 for a `kind` ('adapter') that is not among the `known`, with the nearest of them."""
        hint = did_you_mean(name, known) or "GET /v1/models lists all names."
        return ApiError(404, f"There is no {kind} {name[:MAX_QUOTED]!r}: {hint}", param=param)

    def profile(self, name: str, *, param: str = "model") -> ProfileVersion:
        """The profile `name`, or one version of it as `name@3`; 404 otherwise."""
        plain, at, version = name.partition("@")
        if plain not in self.registry.profiles:
            raise self.not_found("profile", plain, self.registry.profiles, param)
        if not at:
            return self.registry.profiles[plain]
        versions = {str(number): pinned for number, pinned in self.registry.versions[plain].items()}
        if version not in versions:
            latest = ", ".join(sorted(versions, key=int)[-8:])
            message = f"Profile {plain!r} has no version {version[:MAX_QUOTED]!r}; it has {latest}."
            raise ApiError(404, message, param=param)
        return versions[version]

    def resolve_profile(self, version: ProfileVersion) -> Fusion:
        """The fusion of a profile version, its parents as pinned."""
        recipe = parse(version.recipe, max_weight=math.inf)  # the limit was checked when the version was made
        ranks = {digest: self.registry.ranks[digest] for digest in version.parents.values()}
        return Fusion(recipe, version.parents, version.digest, version.name, version, version.defaults, ranks)

    def resolve_recipe(self, recipe: Recipe, *, param: str = "model") -> Fusion:
        """Bind a recipe's names to the adapters registered now."""
        adapters = self.registry.adapters
        records = []
        for name in recipe.adapters:
            if name in self.registry.profiles:
                raise ApiError(400, f"{name!r} is a profile; a recipe combines adapters only.", param=param)
            if name not in adapters:
                raise self.not_found("adapter", name, adapters, param)
            records.append(adapters[name])
        return self.bind(recipe, records)

    def bind(self, recipe: Recipe, records: Sequence[AdapterRecord]) -> Fusion:
        """The fusion of `recipe` over the adapters of these records."""
        parents = {record.name: record.digest for record in records}
        ranks = {record.digest: record.rank for record in records}
        digest = fusion_digest(recipe, base=self.base, parents=parents)
        return Fusion(recipe, parents, digest, "(inline)", ranks=ranks)

    def look_up(self, text: Any, *, param: str = "model") -> Fusion | None:
        """What `text` names: None for the base, else profile, adapter or recipe, in that order."""
        if not isinstance(text, str):
            raise ApiError(400, f"{param!r} must be a string, got {text!r:.{MAX_QUOTED}}.", param=param)
        if text == self.base:
            return None
        registry = self.registry
        if text in registry.profiles or "@" in text:
            return self.resolve_profile(self.profile(text, param=param))
        if text in registry.adapters:
            return self.resolve_recipe(parse(text), param=param)
        try:
            recipe = parse(text, max_weight=self.max_weight)
        except RecipeError as error:
            raise ApiError(400, str(error), param=param) from error
        if len(recipe.terms) == 1 and recipe.is_sum and recipe.adapters[0] == text.strip():
            raise self.not_found("model", text, [self.base, *registry.profiles, *registry.adapters], param)
        return self.resolve_recipe(recipe, param=param)

    def resolve_field(self, value: Any) -> Fusion | None:
        """What the request key `fusion` names: a name, a recipe, or the JSON form of one."""
        if isinstance(value, dict):
            try:
                recipe = from_json(value, max_weight=self.max_weight)
            except RecipeError as error:
                raise ApiError(400, str(error), param="fusion") from error
            return self.resolve_recipe(recipe, param="fusion")
        if not isinstance(value, str):
            raise ApiError(
                400,
                f"'fusion' must be a profile, a recipe or an object with 'adapters', got {value!r:.{MAX_QUOTED}}.",
                param="fusion",
            )
        return self.look_up(value, param="fusion")

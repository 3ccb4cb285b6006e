"""From what a request says to what it means: base, or a recipe with its parents' digests."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from adapters import Recipe, RecipeError, from_json, fusion_digest, parse
from service.errors import ApiError
from service.registry import ProfileVersion, Registry


@dataclass(frozen=True, slots=True)
class Fusion:
    """A recipe whose adapter names are bound to digests; `label` names it in metrics."""

    recipe: Recipe
    parents: Mapping[str, str]
    digest: str
    label: str
    profile: ProfileVersion | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


class Names:
    """The one namespace of base, profiles and adapters, and the lookups in it."""

    def __init__(self, base: str, registry: Registry, *, max_weight: float) -> None:
        self.base = base
        self.registry = registry
        self.max_weight = max_weight

    def taken(self, name: str) -> str | None:
        """What already has this name, as words, or None."""
        if name == self.base:
            return "the base model"
        if name in self.registry.profiles:
            return "a profile"
        return "an adapter" if name in self.registry.adapters else None

    def unknown(self, what: str, name: str, known: Iterable[str], param: str) -> ApiError:
        near = get_close_matches(name, list(known), 1, 0.5)
        hint = f" Did you mean {near[0]!r}?" if near else " GET /v1/models lists what there is."
        return ApiError(404, f"There is no {what} {name[:100]!r}.{hint}", param=param)

    def profile(self, name: str, *, param: str = "model") -> ProfileVersion:
        """The profile `name`, or one version of it as `name@3`; 404 otherwise."""
        plain, at, version = name.partition("@")
        if plain not in self.registry.profiles:
            raise self.unknown("profile", plain, self.registry.profiles, param)
        if not at:
            return self.registry.profiles[plain]
        versions = self.registry.versions[plain]
        wanted = {str(number): found for number, found in versions.items()}.get(version)
        if wanted is None:
            have = ", ".join(str(v) for v in sorted(versions)[-8:])
            raise ApiError(404, f"Profile {plain!r} has no version {version[:100]!r}; it has {have}.", param=param)
        return wanted

    def of_profile(self, version: ProfileVersion) -> Fusion:
        """The fusion a profile version stands for, its parents as pinned."""
        recipe = parse(version.recipe, max_weight=math.inf)  # the limit was looked at when it was made
        return Fusion(recipe, version.parents, version.digest, version.name, version, version.defaults)

    def of_recipe(self, recipe: Recipe, *, param: str = "model") -> Fusion:
        """Bind a recipe's names to the adapters registered now."""
        adapters = self.registry.adapters
        parents = {}
        for name in recipe.adapters:
            if name in self.registry.profiles:
                raise ApiError(400, f"{name!r} is a profile; a recipe combines adapters only.", param=param)
            if name not in adapters:
                raise self.unknown("adapter", name, adapters, param)
            parents[name] = adapters[name].digest
        digest = fusion_digest(recipe, base=self.base, parents=parents)
        return Fusion(recipe, parents, digest, "(inline)")

    def look_up(self, text: Any, *, param: str = "model") -> Fusion | None:
        """What `text` names: None for the base, else profile, adapter or recipe, in that order."""
        if not isinstance(text, str):
            raise ApiError(400, f"{param!r} must be text, not {type(text).__name__}.", param=param)
        if text == self.base:
            return None
        if text in self.registry.profiles or "@" in text:
            return self.of_profile(self.profile(text, param=param))
        registry = self.registry
        if text in registry.adapters:
            return self.of_recipe(parse(text), param=param)
        try:
            recipe = parse(text, max_weight=self.max_weight)
        except RecipeError as error:
            raise ApiError(400, str(error), param=param) from error
        if len(recipe.terms) == 1 and recipe.is_sum and recipe.adapters[0] == text.strip():
            known = [self.base, *registry.profiles, *registry.adapters]
            raise self.unknown("model", text, known, param)
        return self.of_recipe(recipe, param=param)

    def of_field(self, value: Any) -> Fusion | None:
        """The `fusion` request key: a name, a recipe, or the JSON form."""
        if isinstance(value, dict):
            try:
                recipe = from_json(value, max_weight=self.max_weight)
            except RecipeError as error:
                raise ApiError(400, str(error), param="fusion") from error
            return self.of_recipe(recipe, param="fusion")
        if not isinstance(value, str):
            raise ApiError(
                400,
                f"'fusion' must be a profile, a recipe or an object with 'adapters', not {type(value).__name__}.",
                param="fusion",
            )
        return self.look_up(value, param="fusion")

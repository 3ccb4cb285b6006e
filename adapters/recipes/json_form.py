"""The JSON form of a recipe: `{"adapters": [{"name", "weight"}, …], "method": …, option: …}`, and for what is around
it `"answer": true` and `"gate": {"by": name, "bounds": {adapter: [low, high]}}`.
"""

from collections.abc import Mapping
from itertools import starmap

from adapters.errors import RecipeError, quote
from adapters.recipes import checks, weight_checks
from adapters.recipes.gates import Bounds, Gate
from adapters.recipes.grammar import check_length
from adapters.recipes.method import Value
from adapters.recipes.methods import DEFAULT_METHOD
from adapters.recipes.recipe import Recipe, Term
from adapters.recipes.weight_json import read_number, read_weight
from adapters.recipes.weights import Weight

_OWN = ("adapters", "method", "answer", "gate")


def from_json(obj: object, *, max_weight: float = checks.MAX_WEIGHT) -> Recipe:
    """Read the JSON form; RecipeError for anything but a valid recipe."""
    if not isinstance(obj, Mapping):
        raise RecipeError(f'a fusion in JSON form is an object like {{"adapters": […]}}, got {quote(obj)}')
    weights = _read_terms(obj.get("adapters"), max_weight)
    method = checks.find_method(obj.get("method", DEFAULT_METHOD), None)
    options: dict[str, Value] = {}
    for key, value in obj.items():
        if key not in _OWN:
            option = checks.find_option(method, key, None, _OWN)
            options[option.name] = checks.check_option(option, value, weights, None)
    checks.check_arity(method, options, len(weights), None)
    answer = obj.get("answer", False)
    if not isinstance(answer, bool):
        raise RecipeError(f"'answer' must be true or false, got {quote(answer)}")
    weight_checks.check_positions(method, weights, answer=answer)
    gate = _read_gate(obj["gate"], weights, max_weight) if "gate" in obj else None
    if gate is not None and method.name != DEFAULT_METHOD:
        raise RecipeError(f"a gate's recipe is a sum, got the method {method.name!r}")
    if gate is not None:
        weight_checks.check_chosen(weights, gate, answer=answer)
    terms = tuple(starmap(Term, weights.items()))
    return check_length(Recipe(method.name, terms, tuple(options.items()), answer, gate))


def _read_terms(entries: object, max_weight: float) -> dict[str, Weight]:
    if not isinstance(entries, list | tuple) or not entries:
        raise RecipeError(f"'adapters' must be a list with at least one entry, got {quote(entries)}")
    weights: dict[str, Weight] = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or "name" not in entry or not set(entry) <= {"name", "weight"}:
            raise RecipeError(f"'adapters[{index}]' must be {{name, weight}}, got {quote(entry)}")
        name, weight = entry["name"], entry.get("weight", 1.0)
        if not isinstance(name, str):
            raise RecipeError(f"'adapters[{index}].name' must be a string, got {quote(name)}")
        checks.add_term(weights, name, read_weight(weight, f"adapters[{index}].weight"), max_weight)
    return weights


def _read_gate(value: object, weights: Mapping[str, Weight], max_weight: float) -> Gate:
    expected = '{"by": name, "bounds": {adapter: [low, high]}}'
    if not isinstance(value, Mapping) or value.keys() != {"by", "bounds"} or not isinstance(value["by"], str):
        raise RecipeError(f"'gate' must be {expected}, got {quote(value)}")
    by = checks.check_gate_name(value["by"], weights, None)
    if not isinstance(value["bounds"], Mapping):
        raise RecipeError(f"'gate.bounds' must be {{adapter: [low, high]}}, got {quote(value['bounds'])}")
    bounds: dict[str, Bounds] = {}
    for name, span in value["bounds"].items():
        if not isinstance(span, list | tuple) or len(span) != 2:
            raise RecipeError(f"'gate.bounds' must be {{adapter: [low, high]}}, got {quote({name: span})}")
        low, high = (read_number(number, "gate.bounds") for number in span)
        checks.add_bounds(bounds, name, (low, high), weights, max_weight, None)
    return checks.check_gate(by, bounds, None)

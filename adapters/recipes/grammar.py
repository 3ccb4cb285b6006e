"""The text of a recipe.

recipe = mix | answer | "gate" "(" ( sum | answer ) { "," ( "by" "=" name | name "in" NUMBER ".." NUMBER ) } ")"
answer = "answer" "(" mix ")"
mix    = sum | METHOD "(" sum { "," option } ")"
sum    = term { "+" term }
term   = [ weight "*" ] name
weight = course | "{" PATTERN ":" course { "," PATTERN ":" course } "}" | "[" NUMBER { "," NUMBER } "]"
course = level | "steps" "(" start ":" level { "," start ":" level } ")" | "fade" "(" NUMBER ".." NUMBER "," COUNT ")"
level  = NUMBER | "ramp" "(" NUMBER ".." NUMBER ")"
start  = "prompt" | COUNT
option = NAME "=" ( NUMBER | name )
name   = NAME | "`" ANY_NAME "`" | '"' ANY_NAME '"'

NAME is what `PLAIN_PATTERN` matches, ANY_NAME what `check_name` takes. A gate has one `by`, and an `answer` inside it
is around a sum.
"""

from dataclasses import replace
from itertools import starmap

from adapters.errors import RecipeError, clip, did_you_mean, quote
from adapters.recipes import checks, weight_checks
from adapters.recipes.gates import Bounds
from adapters.recipes.method import Value
from adapters.recipes.methods import DEFAULT_METHOD, METHODS
from adapters.recipes.recipe import Recipe, Term
from adapters.recipes.weight_parser import FUNCTIONS, WeightParser
from adapters.recipes.weights import Weight

MAX_TEXT = 8192
WRAPPERS = ("answer", "gate")
SUM_END, CALL_END = "'+' or the end of the recipe", "the end of the recipe after ')'"


def parse(text: str, *, max_weight: float = checks.MAX_WEIGHT) -> Recipe:
    """Read a recipe's text; RecipeError, with the position, for anything outside the grammar or the bounds."""
    if not isinstance(text, str):
        raise RecipeError(f"a recipe must be a string, got {quote(text)}", 0)
    if len(text) > MAX_TEXT:
        raise RecipeError(f"a recipe has at most {MAX_TEXT} characters, got {len(text)}", MAX_TEXT)
    return check_length(_Parser(text, max_weight).recipe())


def check_length(recipe: Recipe) -> Recipe:
    """The recipe; RecipeError unless its canonical text can be read back."""
    if (length := len(recipe.format())) > MAX_TEXT:
        raise RecipeError(f"a recipe has at most {MAX_TEXT} characters in canonical form, got {length}")
    return recipe


class _Parser(WeightParser):
    """Recursive descent; each method reads what it is named after."""

    def __init__(self, text: str, max_weight: float) -> None:
        super().__init__(text)
        self.max_weight = max_weight

    def recipe(self) -> Recipe:
        """The whole text as one recipe."""
        if self.skip() == len(self.text):
            raise RecipeError("the recipe is empty: expected for example '0.6*task + 0.4*safety'", self.at)
        word = self.called()
        match word:
            case "gate":
                recipe = self._gate()
            case "answer":
                recipe = self._answer()
            case _:
                recipe = self._mix(answer=False)
        if self.skip() < len(self.text):
            is_sum = word is None or word in FUNCTIONS
            raise self.unexpected(f"expected {SUM_END if is_sum else CALL_END}")
        return recipe

    def _answer(self, *, gated: bool = False) -> Recipe:
        self.word()
        self.expect("(")
        recipe = self._mix(answer=True, gated=gated)
        self.expect(")", "expected '+' or ')'")
        return recipe

    def _gate(self) -> Recipe:
        self.word()
        self.expect("(")
        recipe = self._answer(gated=True) if self.called() == "answer" else self._mix(answer=False, gated=True)
        by: str | None = None
        bounds: dict[str, Bounds] = {}
        while self.accept(","):
            place = self.skip()
            name = self.name()
            if self.accept("="):
                if name != "by" or by is not None:
                    raise RecipeError(f"a gate has no option {name!r} here: expected one 'by=NAME'", place)
                name_at = self.skip()
                by = checks.check_gate_name(self.name(), recipe.weights, name_at)
            elif self.peek() == "i" and self.word() == "in":
                span = self.span("safety in 0..0.8")
                checks.add_bounds(bounds, name, span, recipe.weights, self.max_weight, place)
            else:
                raise RecipeError(f"expected 'by=NAME' or 'ADAPTER in LOW..HIGH', found {name!r}", place)
        closing = self.skip()
        self.expect(")", "expected '+', ',' or ')'")
        gate = checks.check_gate(by, bounds, closing)
        weight_checks.check_chosen(recipe.weights, gate, answer=recipe.answer, position=closing)
        return replace(recipe, gate=gate)

    def _mix(self, *, answer: bool, gated: bool = False) -> Recipe:
        word, start = self.called(), self.at
        if word is None or word in FUNCTIONS:
            weights, places = self._sum()
            weight_checks.check_positions(METHODS[DEFAULT_METHOD], weights, answer=answer, places=places)
            return Recipe(DEFAULT_METHOD, tuple(starmap(Term, weights.items())), answer=answer)
        if gated or (word in WRAPPERS and answer):
            raise RecipeError(f"{word!r} is called inside {'a gate' if gated else 'answer(…)'}: {_NESTING}", start)
        return self._call(answer=answer)

    def _call(self, *, answer: bool) -> Recipe:
        start = self.at
        method = checks.find_method(self.word(), start, (*WRAPPERS, *FUNCTIONS))
        self.expect("(")
        weights, places = self._sum()
        options: dict[str, Value] = {}
        while self.accept(","):
            place = self.skip()
            option = checks.find_option(method, self.word(), place)
            if option.name in options:
                raise RecipeError(f"option {option.name!r} is given twice: keep one", place)
            self.expect("=")
            place = self.skip()
            options[option.name] = checks.check_option(option, self.value(), weights, place)
        closing = self.skip()
        self.expect(")", "expected '+', ',' or ')'")
        checks.check_arity(method, options, len(weights), closing)
        weight_checks.check_positions(method, weights, answer=answer, places=places, answer_at=start)
        return Recipe(method.name, tuple(starmap(Term, weights.items())), tuple(options.items()), answer=answer)

    def _sum(self) -> tuple[dict[str, Weight], dict[str, int]]:
        """The weights, and where each begins, by adapter."""
        weights: dict[str, Weight] = {}
        places: dict[str, int] = {}
        while True:
            place = self.skip()
            weight, name, name_at = self._term()
            checks.add_term(weights, name, weight, self.max_weight, weight_at=place, name_at=name_at)
            places[name] = place
            if not self.accept("+"):
                return weights, places

    def _term(self) -> tuple[Weight, str, int]:
        function = self.function()
        if function is not None:
            self.expect("*", f"expected '*' between {clip(str(function))} and an adapter's name")
            name_at = self.skip()
            return function, self.name(), name_at
        number = self.number_text()
        if number is None and self.peek() in "+-" and self.peek():
            raise self.unexpected("expected digits after the sign, as in '-1*task'")
        if number is not None:
            self.expect("*", f"expected '*' between the weight {clip(number)} and an adapter's name")
        name_at = self.skip()
        name = self.name()
        after = self.char_after(self.at)
        if after == "(":
            if name in FUNCTIONS:
                raise RecipeError(f"a term has one weight: multiply the number into {name}(…)", name_at)
            other = "" if name in METHODS else did_you_mean(name, FUNCTIONS)
            hint = _NESTING if name in WRAPPERS else other or "methods do not nest"
            raise RecipeError(f"{name!r} is called inside a recipe: {hint}", name_at)
        if after == "*":
            self.skip()
            hint = f"expected a decimal weight before '*', found {name!r}"
            raise RecipeError(f"{hint}; terms are joined by '+', as in '1*a + -0.4*b'", name_at)
        return (1.0 if number is None else float(number)), name, name_at


_NESTING = "gate(…) and answer(…) go around a whole recipe, in this order, and a gate's recipe is a sum"

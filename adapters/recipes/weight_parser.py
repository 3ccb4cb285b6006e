"""The text of a weight; `grammar` has its rules."""

import re

from adapters.errors import RecipeError
from adapters.recipes import weight_checks as checks
from adapters.recipes.scanner import Scanner
from adapters.recipes.weights import PROMPT, ByModule, Components, Course, Fade, Level, Ramp, Steps, Weight

PATTERN = re.compile(r"[A-Za-z0-9_.*?-]{1,128}")
FUNCTIONS = ("ramp", "steps", "fade")
_STARTS = "'prompt' or the number of an answer's token, from 0 on"


class WeightParser(Scanner):
    """Reads weights that are functions."""

    def function(self) -> Weight | None:
        """A weight that is no number, when one begins here."""
        if self.called() in FUNCTIONS:
            return self._course()
        if self.accept("{"):
            return self._by_module()
        return self._components() if self.accept("[") else None

    def _by_module(self) -> ByModule:
        rules: dict[str, Course] = {}
        while True:
            place = self.skip()
            pattern = PATTERN.match(self.text, self.at)
            if pattern is None:
                raise self.unexpected("expected a pattern of module names, as in '*.mlp.*'")
            self.at = pattern.end()
            self.expect(":")
            checks.add_rule(rules, pattern.group(), self._course(), place)
            if not self.accept(","):
                self.expect("}", "expected ',' or '}'")
                return ByModule(tuple(rules.items()))

    def _components(self) -> Components:
        numbers: list[float] = []
        while True:
            place = self.skip()
            checks.add_component(numbers, self.number(), place)
            if not self.accept(","):
                self.expect("]", "expected ',' or ']'")
                return Components(tuple(numbers))

    def _course(self) -> Course:
        match self.called():
            case "steps":
                return self._steps()
            case "fade":
                return self._fade()
        return self._level()

    def _level(self) -> Level:
        word = self.called()
        if word is None:
            return self.number()
        if word != "ramp":
            raise RecipeError(f"{word!r} is called inside a weight: expected a number, as in 'ramp(0.2..0.6)'", self.at)
        self.word()
        self.expect("(")
        ramp = Ramp(*self.span("ramp(0.2..0.6)"))
        self.expect(")")
        return ramp

    def _steps(self) -> Steps:
        self.word()
        self.expect("(")
        rules: dict[int, Level] = {}
        while True:
            place = self.skip()
            start = self._start()
            self.expect(":")
            checks.add_step(rules, start, self._level(), place)
            if not self.accept(","):
                self.expect(")", "expected ',' or ')'")
                return Steps(tuple(rules.items()))

    def _start(self) -> int:
        place = self.at
        if self.peek().isalpha():
            if self.word() != "prompt":
                self.at = place
                raise self.unexpected(f"expected {_STARTS}")
            return PROMPT
        return checks.check_start(self.whole(_STARTS), place)

    def _fade(self) -> Fade:
        self.word()
        self.expect("(")
        first, last = self.span("fade(1..0.2, 8)")
        self.expect(",", "expected ',' and a number of tokens, as in 'fade(1..0.2, 8)'")
        place = self.skip()
        tokens = checks.check_tokens(self.whole("a whole number of tokens"), place)
        self.expect(")")
        return Fade(first, last, tokens)

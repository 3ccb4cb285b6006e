"""How a gate's value becomes weights: the key `gate` of its adapter_config.json."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from adapters.errors import AdapterError, did_you_mean, quote
from adapters.recipes import Gate

MAX_GATE_BYTES = 1 << 20
"""The largest weights file of a gate: it is asked before every answer of the recipes that name it."""
MAX_TOKEN, MAX_NUMBER = 2**31, 1e6
SHARE_DIGITS, DIGITS = 3, 9
"""Of the share and of the weights: prompts of about the same value share their key-value blocks."""


@dataclass(frozen=True, slots=True)
class Readout:
    """A gate is an adapter that acts at a prompt's last position alone. Its value is log p(`yes`) - log p(`no`) of the
    token after the prompt, two token ids of the base. It stands for the share 1 / (1 + exp(-(scale·value + offset)))
    of the way from the low bound of a weight to its high one.
    """

    yes: int
    no: int
    scale: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        for name in ("yes", "no"):
            token = getattr(self, name)
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < MAX_TOKEN:
                raise _fail(f"its {name} is {quote(token)}: expected a token id, a whole number from 0 on")
        if self.yes == self.no:
            raise _fail(f"its yes and no are both {self.yes}: expected two tokens")
        for name in ("scale", "offset"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) <= MAX_NUMBER:
                raise _fail(f"its {name} is {quote(number)}: expected a number of magnitude {MAX_NUMBER:g} at most")
            object.__setattr__(self, name, float(number) + 0.0)  # one text, and digest, for 1 and 1.0, 0.0 and -0.0

    @classmethod
    def from_json(cls, content: object) -> "Readout":
        """The JSON form, an object with `yes`, `no` and, if they are not 1 and 0, `scale` and `offset`; AdapterError
        'gate' for anything else.
        """
        known = [one.name for one in fields(cls)]
        if not isinstance(content, Mapping):
            raise _fail(f"it is {quote(content)}: expected an object with {', '.join(known)}")
        for key in content:
            if key not in known:
                raise _fail(f"unknown key {quote(key)}: {did_you_mean(key, known) or 'known are ' + ', '.join(known)}")
        if missing := [name for name in ("yes", "no") if name not in content]:
            raise _fail(f"it has no {missing[0]}: expected the token ids yes and no")
        return cls(**content)

    @classmethod
    def from_text(cls, text: str) -> "Readout":
        """What `to_text` made."""
        return cls.from_json(json.loads(text))

    def to_text(self) -> str:
        """The JSON form as text."""
        return json.dumps(asdict(self))

    def check_vocabulary(self, size: int) -> None:
        """AdapterError 'gate' unless both tokens are among the `size` tokens of the base."""
        for name, token in (("yes", self.yes), ("no", self.no)):
            if token >= size:
                raise _fail(f"its {name} is the token {token}, but the base has {size}: it belongs to another base")

    def share(self, value: float) -> float:
        """The share that `value` stands for, 0 to 1; ValueError for a value that is not finite."""
        if not math.isfinite(value):
            raise ValueError(f"the value of a gate is {value}: expected a finite number")
        return 0.5 + 0.5 * math.tanh((self.scale * value + self.offset) / 2)  # which does not overflow

    def choose(self, value: float, gate: Gate) -> dict[str, float]:
        """The weights of the adapters that have bounds, in thousandths of the way between them. ValueError for a value
        that is not finite.
        """
        share = round(self.share(value), SHARE_DIGITS)
        return {name: round(low + (high - low) * share, DIGITS) for name, (low, high) in gate.bounds}


def _fail(what: str) -> AdapterError:
    return AdapterError("gate", f"the adapter's gate cannot be read: {what}")

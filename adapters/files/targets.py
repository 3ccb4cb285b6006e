"""Which modules an adapter's configuration says that it has, as PEFT reads `target_modules` and what narrows it."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from adapters.errors import AdapterError
from adapters.files.matcher import PatternTable
from adapters.files.tensor_names import EMBEDDINGS

MAX_PARTS = 64
"""How many parts of a name's end are compared with the targets; no model nests its modules deeper."""
Test = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Targets:
    """Tests that a module passes when the configuration names it; none where it does not say, or cannot be read."""

    tests: tuple[Test, ...]

    def include(self, module: str) -> bool:
        """Whether PEFT would put factors on the module."""
        return all(test(module) for test in self.tests)


def read_targets(raw: Mapping[str, object]) -> Targets:
    """The tests of a configuration. What is not read here passes everything: this only serves to tell the user."""
    tests: list[Test] = []
    targets, excluded = _read_names(raw.get("target_modules")), _read_names(raw.get("exclude_modules"))
    if targets is not None:
        tests.append(targets)
    if excluded is not None:
        tests.append(lambda module: not excluded(module))
    layers = raw.get("layers_to_transform")
    if isinstance(layers, int) and not isinstance(layers, bool):
        layers = [layers]
    if isinstance(layers, list) and layers:
        numbers = {layer for layer in layers if isinstance(layer, int)}
        pattern = raw.get("layers_pattern")
        patterns = pattern if isinstance(pattern, list) else [pattern] if pattern else []
        lists = {name for name in patterns if isinstance(name, str)}
        tests.append(lambda module: _read_layer(module, lists) in numbers)
    if raw.get("ensure_weight_tying"):  # PEFT saves the factors of the embedding for the output head, too
        tests = [_allow_tied(test) for test in tests]
    return Targets(tuple(tests))


def _allow_tied(test: Test) -> Test:
    return lambda module: module.rpartition(".")[2] in EMBEDDINGS or test(module)


def _read_names(names: object) -> Test | None:
    """The test for a list of names' ends, or for a pattern of the whole name; None for neither."""
    if isinstance(names, list) and names:
        ends = {name for name in names if isinstance(name, str)}
        return lambda module: any(end in ends for end in _ends(module))
    if isinstance(names, str) and names != "all-linear":
        try:
            table = PatternTable((f"^(?:{names})$",), "target_modules")
        except AdapterError:
            return None
        return lambda module: _finds(table, module)
    return None


def _finds(table: PatternTable, module: str) -> bool:
    try:
        return table.find(module) is not None
    except AdapterError:  # it takes too long
        return True


def _read_layer(module: str, lists: Collection[str]) -> int | None:
    """The number of the layer, by PEFT's rule: the last part that is a number, after a name of `lists` if any."""
    pairs = [*pairwise(module.split(".")[1:-1])]
    numbers = (int(part) for before, part in reversed(pairs) if part.isdecimal() and (not lists or before in lists))
    return next(numbers, None)


def _ends(module: str) -> Iterator[str]:
    """The name and what follows each of its last dots."""
    yield module
    at = len(module)
    for _ in range(MAX_PARTS):
        at = module.rfind(".", 0, at)
        if at < 0:
            return
        yield module[at + 1 :]

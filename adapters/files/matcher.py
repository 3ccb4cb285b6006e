"""Which of many patterns is the first to match a module's name. PEFT asks `re.match(rf"(.*\\.)?({key})$", name)`.

All patterns are one nondeterministic automaton (Thompson 1968, "Regular expression search algorithm"), whose common
beginnings share their nodes; the sets of nodes that names reach are made once and kept. So a name costs a step for
each of its characters, whatever the patterns are, and a new set at most a step for each node. The work of one table
is bounded by MAX_NODES and MAX_STEPS.
"""

from collections.abc import Iterable, Sequence

from adapters.errors import AdapterError, quote
from adapters.files.patterns import ALPHABET, FORMS, Anchor, Choice, Item, Repeat, read_pattern

MAX_NODES, MAX_STEPS = 2**16, 2**20
"""Nodes of one table's automaton, and steps to make its sets: both below a second of one core."""
SET_STEPS = 16
"""What a new set counts for besides its nodes, since it is kept."""


class PatternTable:
    """Patterns in order of precedence; `name` is the config's key they are from, for messages.

    AdapterError 'bad_config' for a pattern of a form that is not read, and for patterns too large to match.
    """

    def __init__(self, patterns: Sequence[str], name: str) -> None:
        self._name = name
        self._automaton = _Automaton()
        self._accepts: dict[int, int] = {}
        for index, pattern in enumerate(patterns):
            self._accepts.setdefault(self._add(pattern), index)
        self._numbers: dict[tuple[int, ...], int] = {}
        self._sets: list[tuple[int, ...]] = []
        self._rows: list[dict[str, int]] = []
        self._results: list[int | None] = []
        self._steps = 0
        self._first = self._enter(self._close([0], self._automaton.at_start))

    def find(self, module: str) -> int | None:
        """The index of the first pattern that matches the name, of characters of ALPHABET; None when none does."""
        rows, current = self._rows, self._first
        for character in module:
            following = rows[current].get(character)
            current = self._step(current, character) if following is None else following
        return self._results[current]

    def _add(self, pattern: str) -> int:
        """The node that is reached where `pattern` ends."""
        try:
            return self._automaton.add(read_pattern(pattern))
        except ValueError as error:
            raise AdapterError(
                "bad_config",
                f"{self._name} has the key {quote(pattern)}, which cannot be read: {error}; expected a simple pattern "
                f"of {FORMS}",
            ) from error
        except OverflowError as error:
            raise self._overload() from error

    def _step(self, current: int, character: str) -> int:
        """The number of the set that a character leads to; after a '.', every pattern may also begin."""
        if character not in ALPHABET:
            raise ValueError(f"{character!r} is not a character of module names")
        moves, reached = self._automaton.moves, [0] if character == "." else []
        for node in self._sets[current]:
            edge = moves.last.get(node, -1)
            while edge >= 0:
                if character in moves.labels[edge]:
                    reached.append(moves.targets[edge])
                self._steps += 1
                edge = moves.before[edge]
        following = self._rows[current][character] = self._enter(self._close(reached))
        return following

    def _enter(self, reached: tuple[int, ...]) -> int:
        """The number of the set, a new one if need be."""
        number = self._numbers.setdefault(reached, len(self._sets))
        if number == len(self._sets):
            self._steps += SET_STEPS
            self._sets.append(reached)
            self._rows.append({})
            ends = self._close(reached, self._automaton.at_end)
            self._results.append(min((self._accepts[node] for node in ends if node in self._accepts), default=None))
        return number

    def _close(self, nodes: Iterable[int], anchors: "_Edges | None" = None) -> tuple[int, ...]:
        """The nodes, sorted, and those they lead to without a character, through `anchors` too."""
        reached = set(nodes)
        left = list(reached)
        kinds = (self._automaton.jumps,) if anchors is None else (self._automaton.jumps, anchors)
        while left:
            node = left.pop()
            for edges in kinds:
                edge = edges.last.get(node, -1)
                while edge >= 0:
                    after, edge = edges.targets[edge], edges.before[edge]
                    if after not in reached:
                        reached.add(after)
                        left.append(after)
            self._steps += 1
            if self._steps > MAX_STEPS:
                raise self._overload()
        return tuple(sorted(reached))

    def _overload(self) -> AdapterError:
        return AdapterError(
            "bad_config", f"{self._name} would take too long to match: expected fewer, shorter or simpler patterns"
        )


class _Automaton:
    """Nodes by number, 0 where every pattern begins, and edges to what follows each: `moves` by one of some characters,
    `jumps` without any, `at_start` and `at_end` without any but only there. OverflowError beyond MAX_NODES.
    """

    def __init__(self) -> None:
        self.count = 1
        self.moves, self.jumps, self.at_start, self.at_end = _Edges(), _Edges(), _Edges(), _Edges()
        self._shared: dict[tuple[int, Item], int] = {}

    def add(self, pattern: Choice) -> int:
        """The node where the pattern ends. Equal beginnings are one path, into whose nodes nothing leads back."""
        if len(pattern.options) > 1:
            return self._extend(0, pattern)
        node = 0
        for item in pattern.options[0]:
            known = self._shared.get((node, item))
            if known is None:
                known = self._shared[node, item] = self._extend(node, item)
            node = known
        return node

    def _extend(self, node: int, item: Item) -> int:
        """Let `item` follow `node`; returns the node after it."""
        match item:
            case str():
                after = self.moves.add(node, self._make_node(), item)
            case Anchor(end):
                after = (self.at_end if end else self.at_start).add(node, self._make_node())
            case Choice(options):
                after = self._make_node()
                for option in options:
                    last = self.jumps.add(node, self._make_node())
                    for part in option:
                        last = self._extend(last, part)
                    self.jumps.add(last, after)
            case Repeat(part, low, high):
                after = self._repeat(node, part, low, high)
        return after

    def _repeat(self, node: int, part: Item, low: int, high: int | None) -> int:
        for _ in range(low):
            node = self._extend(node, part)
        after = self.jumps.add(node, self._make_node())
        if high is None:
            back = self.jumps.add(node, self._make_node())
            self.jumps.add(self._extend(back, part), back)
            self.jumps.add(back, after)
        for _ in range((high or low) - low):
            node = self._extend(node, part)
            self.jumps.add(node, after)
        return after

    def _make_node(self) -> int:
        if self.count >= MAX_NODES:
            raise OverflowError
        self.count += 1
        return self.count - 1


class _Edges:
    """Edges by the node they leave, in flat lists of numbers: a list for each node would be work for the garbage
    collector, which keeps the interpreter's lock.
    """

    def __init__(self) -> None:
        self.last: dict[int, int] = {}
        """The newest edge of a node."""
        self.before: list[int] = []
        """The edge of the same node before each, -1 for none."""
        self.targets: list[int] = []
        self.labels: list[str] = []

    def add(self, node: int, target: int, label: str = "") -> int:
        """Let an edge lead from `node` to `target`, which is returned."""
        self.before.append(self.last.get(node, -1))
        self.last[node] = len(self.targets)
        self.targets.append(target)
        self.labels.append(label)
        return target

"""Names of modules as training leaves them: with the names of wrappers inside, or under another root than the base's.

A name is a root and a tail, which begins at the list of layers: `model.` and `layers.0.self_attn.q_proj`.
"""

from collections.abc import Iterable, Mapping

TORCH_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module"})
"""Modules that torch and its launchers put around others while they train; no base has a module of such a name."""
WRAPPERS = TORCH_WRAPPERS | {"base_model", "model", "module", "language_model", "text_model", "llm"}
"""What only says in which class a model was wrapped: the same layers are under more or fewer of these."""
PEFT = ("base_model", "model")

Shape = tuple[int, int]


def unwrap(name: str) -> tuple[str, bool]:
    """The module that a name in an adapter's file means, without torch's wrappers and PEFT's prefix, however often it
    is there; and whether it is there.
    """
    parts = [part for part in name.split(".") if part not in TORCH_WRAPPERS]
    at = 0
    while True:
        start = at + (parts[at : at + 1] == ["module"])  # of torch's data parallelism
        if tuple(parts[start : start + 2]) != PEFT:
            return ".".join(parts[at:]), at > 0
        at = start + 2


def split_root(name: str) -> tuple[str, str]:
    """Root and tail; the tail of a name without a number is its last part."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdecimal()), len(parts))
    at = max(0, first - 1)
    return ".".join(parts[:at]), ".".join(parts[at:])


def is_wrapper(root: str) -> bool:
    """Whether a root says only how the model was wrapped."""
    return WRAPPERS.issuperset(root.split(".")) if root else True


def match_names(shapes: Mapping[str, Shape], base: Mapping[str, Shape]) -> dict[str, str]:
    """The base's names of the modules that it has under another root, where that is the only reading that fits: just
    one module of the base has the tail and the shape. Empty when a module has none, or more than one.
    """
    strays = [name for name in shapes if name not in base]
    if not strays:
        return {}
    by_tail: dict[str, list[str]] = {}
    for name in base:
        by_tail.setdefault(split_root(name)[1], []).append(name)
    names: dict[str, str] = {}
    for stray in strays:
        root, tail = split_root(stray)
        fitting = [name for name in by_tail.get(tail, ()) if base[name] == shapes[stray] and is_wrapper(root)]
        if len(fitting) != 1:
            return {}
        names[stray] = fitting[0]
    targets = set(names.values())
    return names if len(targets) == len(names) and targets.isdisjoint(shapes) else {}


def shared_tails(first: Iterable[str], second: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of different names, one of each, that have the same tail."""
    tails = {split_root(name)[1]: name for name in first}
    pairs = ((tails.get(split_root(name)[1]), name) for name in second)
    return [(one, two) for one, two in pairs if one is not None and one != two]

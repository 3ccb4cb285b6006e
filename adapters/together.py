"""Whether adapters belong to one base, and an adapter to a base, as far as names and shapes show."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import PurePosixPath

from adapters.adapter import LoraAdapter, LoraModule, ModuleFacts
from adapters.errors import AdapterError, quote
from adapters.module_names import Shape, match_names, shared_tails, split_root

SAME_BASE = "if they are of one base, say so with --same-base (`same_base=True`)"
CONVERT = "`lora-fusion convert SECOND --like FIRST --out DIR` names the second's modules as the first's"


def check_together(adapters: Mapping[str, LoraAdapter], *, same_base: bool = False) -> list[str]:
    """AdapterError unless all adapters fit one base; returns what their user should know, a sentence each.

    'base' when two name different ones, unless only the folder or organization before the name differs; 'modules' when
    one shares no module with the others and is not known to be of the same base; 'shape' when sizes differ. With
    `same_base` the caller knows that the base is one, and only sizes are compared.
    """
    notes = [] if same_base else [*_compare_bases(adapters), *_compare_modules(adapters)]
    first: dict[str, tuple[str, ModuleFacts]] = {}
    for name, adapter in adapters.items():
        for key, facts in adapter.facts.items():
            other, expected = first.setdefault(key, (name, facts))
            if facts.shape != expected.shape or facts.is_embedding != expected.is_embedding:
                raise AdapterError(
                    "shape",
                    f"module {key!r} is {_describe(expected)} in {other!r} and {_describe(facts)} in {name!r} "
                    "(d_out, d_in): they were trained on different bases",
                )
    return notes


def is_same_name(one: str, two: str) -> bool:
    """Whether two names of a base differ at most in what is before the last '/', and in case."""
    return _last_part(one) == _last_part(two)


def match_adapter(adapter: LoraAdapter, base: Mapping[str, Shape]) -> LoraAdapter:
    """The adapter with the base's names, where its own have another root and only one reading fits; see
    `match_names`. `base` holds (d_out, d_in) by module. AdapterError 'shape' when a copy of a weight that was left out
    is of another size than the base's.
    """
    names = match_names(adapter.shapes, base)
    for weight, shape in adapter.copies.items():
        module, _, kind = weight.rpartition(".")
        layer = base.get(names.get(module, module))
        if kind == "weight" and layer is not None and sorted(layer) != sorted(shape):
            raise AdapterError(
                "shape",
                f"the adapter was trained with a {weight!r} of the sizes {shape}, the base's has {layer}: the "
                "vocabulary was changed before the training, so serve the base that was saved then",
            )
    return rename(adapter, names)


def rename(adapter: LoraAdapter, names: Mapping[str, str]) -> LoraAdapter:
    """The adapter with other names for some modules, which a note tells."""
    if not names:
        return adapter
    modules: dict[str, LoraModule] = {names.get(name, name): module for name, module in adapter.modules.items()}
    old, new = next(iter(names.items()))
    note = f"{len(names)} modules are read under the base's names: {quote(old)} as {quote(new)}"
    return replace(adapter, modules=dict(sorted(modules.items())), notes=(*adapter.notes, note))


def _compare_bases(adapters: Mapping[str, LoraAdapter]) -> Iterable[str]:
    first: tuple[str, str] | None = None
    for name, adapter in adapters.items():
        if adapter.base is None:
            continue
        if first is None:
            first = (name, adapter.base)
        elif not is_same_name(first[1], adapter.base):
            raise AdapterError(
                "base",
                f"adapters {first[0]!r} and {name!r} name different bases, {quote(first[1])} and "
                f"{quote(adapter.base)}: fuse adapters of one base; {SAME_BASE}",
            )
        elif adapter.base != first[1]:
            yield (
                f"{first[0]!r} and {name!r} name their base differently, {quote(first[1])} and {quote(adapter.base)}: "
                "taken for one"
            )


def _compare_modules(adapters: Mapping[str, LoraAdapter]) -> Iterable[str]:
    """Nothing, or AdapterError: adapters without a common module add up to something only under the same names. What
    has the same name under any root, such as an output head, says nothing of the layers.
    """
    known: dict[str, str] = {}
    for name, adapter in adapters.items():
        layers, others = _select_layers(adapter.facts), _select_layers(known)
        if known and (known.keys().isdisjoint(adapter.facts) or (layers and others and others.isdisjoint(layers))):
            _check_apart(known, name, adapter, adapters)
        for module in adapter.facts:
            known.setdefault(module, name)
    return ()


def _check_apart(
    known: Mapping[str, str], name: str, adapter: LoraAdapter, adapters: Mapping[str, LoraAdapter]
) -> None:
    if tails := shared_tails(known, adapter.facts):
        one, two = tails[0]
        raise AdapterError(
            "modules",
            f"adapters {known[one]!r} and {name!r} share no module of layers, but {len(tails)} have the same ending: "
            f"{quote(one)} and {quote(two)}; {CONVERT}",
        )
    roots, own = _layer_roots(known), _layer_roots(adapter.facts)
    other = next(iter(known.values()))
    is_known = adapter.base is not None and adapters[other].base is not None
    if not is_known or (roots and own and roots.isdisjoint(own)):
        raise AdapterError(
            "modules",
            f"adapters {other!r} and {name!r} share no module: {_show(known)} and {_show(adapter.facts)}; {SAME_BASE}",
        )


def _show(modules: Iterable[str]) -> str:
    """One of the modules, in a layer if there is one."""
    names = list(modules)
    return quote(min(_select_layers(names) or names))


def _select_layers(modules: Iterable[str]) -> set[str]:
    """The modules that are in a numbered layer."""
    return {module for module in modules if "." in split_root(module)[1]}


def _layer_roots(modules: Iterable[str]) -> set[str]:
    """Where the layers of these modules are, as far as they have any."""
    return {root for root, tail in map(split_root, modules) if "." in tail}


def _describe(facts: ModuleFacts) -> str:
    return f"{'an embedding ' if facts.is_embedding else ''}{facts.shape}"


def _last_part(base: str) -> str:
    """The name of a model in a path or on a hub, also in the hub's cache, `models--ORG--NAME/snapshots/REVISION`."""
    parts = PurePosixPath(base.replace("\\", "/").rstrip("/")).parts
    cached = next((part for part in parts if part.startswith("models--") and "snapshots" in parts), None)
    return (cached.rpartition("--")[2] if cached else parts[-1] if parts else base).lower()


def name_like(adapter: LoraAdapter, other: LoraAdapter) -> LoraAdapter:
    """The adapter with its layers under the other's root, when each has one; AdapterError 'modules' else, and 'shape'
    when modules of both differ in size.
    """
    roots, wanted = _layer_roots(adapter.facts), _layer_roots(other.facts)
    if len(roots) != 1 or len(wanted) != 1:
        raise AdapterError(
            "modules",
            f"the layers are under {', '.join(sorted(map(quote, roots)))} and those to be like under "
            f"{', '.join(sorted(map(quote, wanted)))}: expected one place in each",
        )
    (root,) = wanted
    tails = {name: split_root(name)[1] for name in adapter.facts}
    names = {name: f"{root}.{tail}" if root else tail for name, tail in tails.items() if "." in tail}
    renamed = rename(adapter, {name: new for name, new in names.items() if name != new})
    check_together({"this": renamed, "like": other}, same_base=True)
    return renamed

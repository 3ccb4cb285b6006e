"""LoRA on experts that are one parameter each in the base, as PEFT saves it for `target_parameters`.

The experts' factors lie in one pair: A [E·r, d_in], expert by expert, B [d_out, r·E], expert e in every E-th column. A
file has the pair of `gate_up_proj` as the module `….experts.base_layer` and that of `down_proj` as `….experts`; when
only one of the two is trained, it is `….experts`. Here every expert is a module of its own,
`….experts.3.gate_up_proj`, whose update is its own.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from adapters.adapter import LoraModule
from adapters.errors import AdapterError, quote

GATE_UP, DOWN = "gate_up_proj", "down_proj"
INNER, OUTER = ".experts.base_layer", ".experts"
"""Ends of the two pairs' names in a file."""
_EXPERT = re.compile(rf"(.*\.experts)\.([0-9]{{1,5}})\.({GATE_UP}|{DOWN})")


def read_parameters(targets: object) -> tuple[str, ...]:
    """The parameters of experts that `target_parameters` names; AdapterError for any other parameter."""
    if not targets:
        return ()
    names = targets if isinstance(targets, list) else [targets]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(rf"(?:.*\.)?experts\.(?:{GATE_UP}|{DOWN})", name):
            raise AdapterError(
                "target_parameters",
                f"the adapter has target_parameters={quote(targets)}: of parameters, those of experts can be fused, "
                f"experts.{GATE_UP} and experts.{DOWN}",
            )
    return tuple(sorted({str(name).rpartition(".")[2] for name in names}))


def name_parameters(modules: Iterable[str], parameters: Sequence[str]) -> dict[str, str]:
    """The parameter's name, `….experts.down_proj`, of each pair of a file's `modules`. `parameters` are the
    configuration's; none when it has no target_parameters.
    """
    known = set(modules)
    names = {}
    for module in known if parameters else ():
        if module.endswith(INNER):
            names[module] = f"{module.removesuffix('.base_layer')}.{GATE_UP}"
        elif module.endswith(OUTER):
            is_pair = f"{module}.base_layer" in known
            if not is_pair and len(parameters) > 1:
                raise AdapterError(
                    "target_parameters", f"module {quote(module)} has the LoRA of one of {parameters}: expected both"
                )
            names[module] = f"{module}.{DOWN if is_pair else parameters[0]}"
    return names


def split_experts(
    modules: Mapping[str, LoraModule], names: Mapping[str, str], ranks: Mapping[str, int]
) -> dict[str, LoraModule]:
    """The modules with every expert's factors as a module of their own; `names` are those of `name_parameters`, and
    `ranks` has the rank of one expert by module.
    """
    split: dict[str, LoraModule] = {}
    for name, module in modules.items():
        if name not in names:
            split[name] = module
            continue
        rank, (root, _, parameter) = ranks[name], names[name].rpartition(".")
        count = module.rank // rank
        a, b = module.a.view(count, rank, -1), module.b.view(-1, rank, count)
        for expert in range(count):
            factors = (a[expert].clone(), b[:, :, expert].contiguous())
            split[f"{root}.{expert}.{parameter}"] = LoraModule(*factors, module.scaling)
    return split


def join_experts(modules: Mapping[str, LoraModule]) -> tuple[dict[str, LoraModule], dict[str, LoraModule]]:
    """What PEFT saves, when experts have a fused `gate_up_proj`: the modules of the file, and what its configuration
    describes instead of the pairs, one expert by the parameter's name. Both are `modules` when there are no such.

    Missing ranks and experts are zeros; scalings are multiplied into B where experts differ in rank or scaling.
    AdapterError 'target_parameters' when only one of the two parameters has a LoRA in some layers and both in others.
    """
    roots = {match[1] for name in modules if (match := _EXPERT.fullmatch(name)) and match[3] == GATE_UP}
    groups: dict[str, dict[str, dict[int, LoraModule]]] = {root: {} for root in sorted(roots)}
    tensors, described = {}, {}
    for name, module in modules.items():
        match = _EXPERT.fullmatch(name)
        if match is None or match[1] not in groups:
            tensors[name] = described[name] = module
        else:
            groups[match[1]].setdefault(match[3], {})[int(match[2])] = module
    count = 1 + max((e for group in groups.values() for experts in group.values() for e in experts), default=0)
    if len({tuple(sorted(group)) for group in groups.values()}) > 1:
        raise AdapterError("target_parameters", f"{GATE_UP} and {DOWN} of experts have a LoRA in different layers")
    for root, group in groups.items():
        for parameter, experts in group.items():
            inner = parameter == GATE_UP and DOWN in group
            pair, one = _join(experts, count)
            tensors[f"{root}.base_layer" if inner else root] = pair
            described[f"{root}.{parameter}"] = one
    return dict(sorted(tensors.items())), dict(sorted(described.items()))


def _join(experts: Mapping[int, LoraModule], count: int) -> tuple[LoraModule, LoraModule]:
    """The pair of `count` experts, and one expert that has its rank and scaling."""
    first = next(iter(experts.values()))
    rank = max(module.rank for module in experts.values())
    (d_out, d_in), scalings = first.shape, {module.scaling for module in experts.values()}
    scaling = first.scaling if len(scalings) == 1 else 1.0
    a, b = first.a.new_zeros(count, rank, d_in), first.b.new_zeros(d_out, rank, count)
    for expert, module in experts.items():
        a[expert, : module.rank] = module.a
        own = module.b.to(torch.float64) * module.scaling if scaling != module.scaling else module.b
        b[:, : module.rank, expert] = own.to(b)
    one = LoraModule(a[0], b[:, :, 0].contiguous(), scaling)
    return LoraModule(a.view(count * rank, d_in), b.view(d_out, rank * count), scaling), one

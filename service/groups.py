"""Adapters declared to share one stack (`FUSION_GROUPS`)."""

import logging

from service.placement import Group
from service.records import AdapterRecord
from service.registry import Registry
from service.settings import Settings

log = logging.getLogger("fusion")


def declared_groups(settings: Settings, registry: Registry) -> list[Group]:
    """The declared groups whose adapters are all registered now, and can all be mixed."""
    groups = [_find_records(declared, registry).values() for declared in settings.groups]
    return [
        {record.digest: record.rank for record in group if record}
        for group in groups
        if all(record is not None and not record.built for record in group)
    ]


def warn_of_idle_groups(settings: Settings, registry: Registry) -> None:
    """Log a warning for every declared group that cannot be served yet."""
    for declared in settings.groups:
        records = _find_records(declared, registry)
        missing = [repr(name) for name, record in records.items() if record is None]
        if missing:
            log.warning("FUSION_GROUPS: %r waits for its adapters %s", declared, ", ".join(missing))
        for record in filter(None, records.values()):
            if record.built:
                log.warning("FUSION_GROUPS: %r has no stack: LoRA on %s cannot be mixed", declared, record.built)
        rank, limit = sum(record.rank for record in records.values() if record), settings.max_lora_rank
        if rank > limit:
            log.warning("FUSION_GROUPS: %r has no stack: rank %d, over FUSION_MAX_LORA_RANK=%d", declared, rank, limit)


def _find_records(declared: str, registry: Registry) -> dict[str, AdapterRecord | None]:
    return {name.strip(): registry.adapters.get(name.strip()) for name in declared.split("+")}

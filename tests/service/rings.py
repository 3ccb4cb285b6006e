"""The keys of a service without an engine."""

import asyncio

from service.key_ring import KeyRing
from service.keys import Keys
from service.registry import Registry
from service.settings import Settings


def make_keys(registry: Registry, settings: Settings, *operator_keys: str) -> Keys:
    """The keys of a registry, and vLLM's."""
    return Keys(settings, registry, asyncio.Lock(), KeyRing(registry, operator_keys))

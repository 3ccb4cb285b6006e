"""The running service: its parts, put together by `startup.open_service`.

A request flows one way: route or gate → names → placement → residency → materializer and store → engine.
"""

from dataclasses import dataclass

from service.catalog import Catalog
from service.engine.proof import Proof
from service.engine.server import Engine
from service.materializer import Materializer
from service.metrics import Metrics
from service.pool import Pool
from service.profiles import Profiles
from service.registry import Registry
from service.resolve import Names
from service.settings import Settings


@dataclass(frozen=True, slots=True)
class FusionService:
    """One server's parts, all of them started."""

    settings: Settings
    engine: Engine
    proof: Proof
    registry: Registry
    names: Names
    metrics: Metrics
    pool: Pool
    catalog: Catalog
    profiles: Profiles
    materializer: Materializer

"""The running service: its parts, put together by `startup.open_service`.

A request flows one way: route or intake → names → placement → residency → materializer and store → engine.
"""

from dataclasses import dataclass

from service.adapter_files import AdapterFiles
from service.catalog import Catalog
from service.engine.proof import Proof
from service.engine.server import Engine
from service.exports import Exports
from service.keys import Keys
from service.limits import Limits
from service.materializer import Materializer
from service.metrics import Metrics
from service.pins import Pins
from service.policy import Policy
from service.pool import Pool
from service.profiles import Profiles
from service.registry import Registry
from service.resolve import Names
from service.scorecards import Scorecards
from service.settings import Settings
from service.sources.fetches import Fetches
from service.threads import Threads


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
    fetches: Fetches
    profiles: Profiles
    scorecards: Scorecards
    policy: Policy
    materializer: Materializer
    files: AdapterFiles
    exports: Exports
    threads: Threads
    keys: Keys
    limits: Limits
    pins: Pins

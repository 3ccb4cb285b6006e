"""The workers of all engines that run behind one client: vLLM's tensor, pipeline and data parallelism.

With data parallelism vLLM's client sends calls to every engine, but gives what the first has answered alone: another
one's failure to load an adapter would not be seen.
"""

from typing import Any

from service.engine.supported import require


class Ranks:
    """Calls to every worker; `client` is vLLM's `AsyncLLM`."""

    def __init__(self, client: Any) -> None:
        require(client, "engine_core")
        require(client.engine_core, "core_engines", "call_utility_all_async")
        self._core = client.engine_core

    @property
    def engines(self) -> int:
        """How many engines there are, each with all stages and shards of the base."""
        return len(self._core.core_engines)

    async def call(self, method: str, *args: Any) -> list[list[Any]]:
        """What every worker's `method` gives, by engine; the first error of any is raised."""
        answers: list[list[Any]] = await self._core.call_utility_all_async("collective_rpc", method, None, args, None)
        return answers

"""Seeded requests on CPUs: a request's answer is the same in however many steps its prompt is computed."""

from collections.abc import Callable
from typing import Any

from service.engine.supported import require


def patch_cpu_seeds(runner: Any) -> None:
    """Have the V1 `runner` class on a CPU draw a seeded request's first token only once its whole prompt is computed.

    vLLM draws one after every part of a prompt and sets the generator back by an offset, which those of CPUs do not
    have: the error would end the engine.
    """
    require(runner, "_model_forward", "_bookkeeping_sync")
    forward: Callable[..., Any] = runner._model_forward
    bookkeep: Callable[..., tuple[Any, ...]] = runner._bookkeeping_sync

    def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        discarded = self.discard_request_mask.np
        generators = self.input_batch.generators
        self.fusion_seeds = {i: generator.get_state() for i, generator in generators.items() if discarded[i]}
        return forward(self, *args, **kwargs)

    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        generators = self.input_batch.generators
        states = self.__dict__.pop("fusion_seeds", {})
        hidden = {i: generators.pop(i) for i in states}
        try:
            return bookkeep(self, *args, **kwargs)
        finally:
            for i, generator in hidden.items():
                generator.set_state(states[i])
            generators.update(hidden)

    runner._model_forward = _model_forward
    runner._bookkeeping_sync = _bookkeeping_sync

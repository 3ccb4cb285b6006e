"""Measure how safe and how useful a model is through any OpenAI-compatible endpoint, and find the best fusion.

Benchmarks are Inspect AI tasks (`tasks`), run for many models at once (`running`); answers are read back from Inspect's
logs (`answers`) and turned into measures with intervals (`results`). A study (`sweeps.study`) measures a grid of
recipes side by side on one server and reports the best. All requests go over HTTP; nothing here imports the server.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eval_clients.endpoint import Endpoint
    from eval_clients.errors import EvaluationError
    from eval_clients.running import RunOptions, prepare_folder
    from eval_clients.sweeps.choice import Limit
    from eval_clients.sweeps.points import Point, expand
    from eval_clients.sweeps.study import Report, Study, run_study
    from eval_clients.tasks.benchmarks import BENCHMARKS, build_task
else:
    _HOMES = {
        "endpoint": ("Endpoint",),
        "errors": ("EvaluationError",),
        "running": ("RunOptions", "prepare_folder"),
        "sweeps.choice": ("Limit",),
        "sweeps.points": ("Point", "expand"),
        "sweeps.study": ("Report", "Study", "run_study"),
        "tasks.benchmarks": ("BENCHMARKS", "build_task"),
    }

    def __getattr__(name: str) -> object:
        for home, names in _HOMES.items():
            if name in names:
                return getattr(importlib.import_module(f"{__name__}.{home}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BENCHMARKS",
    "Endpoint",
    "EvaluationError",
    "Limit",
    "Point",
    "Report",
    "RunOptions",
    "Study",
    "build_task",
    "expand",
    "prepare_folder",
    "run_study",
]

"""Stands in for `service.startup` in a real server: BentoML's processes and the front as they are, a sleep as engine.

`FOLDER/sitecustomize.py` with `INSTALL` brings it into every process that has FOLDER on its PYTHONPATH.
"""

import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Gauge

from service import front
from service.data_folder import hold_data_folder
from service.edge.access import Access
from service.process import end_with_parent
from service.settings import Settings

PROOF = ("proven", "reason", "error", "effect", "tables", "phases", "limits", "engines", "ranks")
INSTALL = f"""
import sys, importlib.abc, importlib.util
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "service.startup":
            return importlib.util.spec_from_file_location(name, {__file__!r})
        return None
sys.meta_path.insert(0, Finder())
"""


class Metrics:
    """Nothing is counted but whether requests are answered."""

    def __init__(self) -> None:
        self.ready = Gauge("fusion_ready", "1 while requests are answered", registry=CollectorRegistry())


class Engine:
    """A process that sleeps."""

    def __init__(self) -> None:
        self.app = FastAPI()
        self.cors = Access().cors
        self.overflows = SimpleNamespace(count=0, last=None)
        command = [sys.executable, "-c", "import time; time.sleep(600)", "EngineCore"]
        self.process = subprocess.Popen(command, preexec_fn=partial(end_with_parent, os.getpid()))

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def death(self) -> str:
        return f"the stub ended with {self.process.returncode}"


def build_app(service: Any) -> FastAPI:
    """An app that a client can freeze."""
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> str:
        return "models"

    @app.get("/freeze")
    async def freeze() -> None:
        re.match("(a|a)*b", "a" * 60)  # 2^60 steps, none of which lets go of the interpreter

    return app


if __name__ == "service.startup":  # not where a test imports `INSTALL`
    front.build_app = build_app


class Registry:
    """Nothing is kept."""

    outage = None

    async def watch(self) -> None:
        """There is no connection."""


@contextmanager
def open_registry(settings: Settings) -> Iterator[Registry]:
    with hold_data_folder(settings.data):
        yield Registry()


@asynccontextmanager
async def open_service(settings: Settings, registry: Registry, metrics: Metrics) -> AsyncIterator[Any]:
    if settings.base_name == "fails":
        raise ValueError("no such base")
    if settings.base_name == "crashes":
        os._exit(3)
    engine = Engine()
    try:
        proof = SimpleNamespace(**dict.fromkeys(PROOF, True))
        keys = SimpleNamespace(ring=SimpleNamespace(identify=Access().identify, is_asked=False))
        yield SimpleNamespace(engine=engine, proof=proof, settings=settings, registry=registry, keys=keys)
    finally:
        engine.process.kill()
        engine.process.wait()

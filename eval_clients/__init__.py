"""Measure how safe and how useful a model is through any OpenAI-compatible endpoint, and find the best fusion.

Benchmarks are Inspect AI tasks (`tasks`), run for many models at once (`running`); answers are read back from Inspect's
logs (`answers`) and turned into measures with intervals (`results`). A study (`sweeps.study`) measures a grid of
recipes side by side on one server and reports the best. All requests go over HTTP; nothing here imports the server.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

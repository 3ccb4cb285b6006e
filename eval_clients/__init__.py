"""Measure how safe and how useful a model is through any OpenAI-compatible endpoint, and find the best fusion.

Benchmarks are Inspect AI tasks (`eval_clients.tasks`), run for many models at once (`eval_clients.running`) and read
back from Inspect's logs (`eval_clients.results`). A sweep (`eval_clients.sweeps.sweep`) asks every point of a grid of
recipes side by side on one server. Nothing here imports the server: all goes over HTTP.
"""

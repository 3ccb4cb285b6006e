"""Replicas of the service on Ray Serve, each a server of its own; see docs/ray.md."""

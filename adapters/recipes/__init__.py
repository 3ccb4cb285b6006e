"""The recipe language, without torch."""

from adapters.errors import did_you_mean

__all__ = ["did_you_mean"]

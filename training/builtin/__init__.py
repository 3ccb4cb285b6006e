"""Data and base model that ship with the package: orders, the safety set, the default base."""

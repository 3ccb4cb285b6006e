"""Adapters on disk. This door is what other packages need of files in general; `load`, `save` and `Store` are in
`adapters`.
"""

from adapters.files.landing import atomic_folder, land_folder
from adapters.files.shipped import SHIPPED, adapter_path, shipped_adapter

__all__ = ["SHIPPED", "adapter_path", "atomic_folder", "land_folder", "shipped_adapter"]

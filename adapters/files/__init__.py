"""Adapters on disk. This door is what other packages need of files in general; `load`, `save` and `Store` are in
`adapters`.
"""

from adapters.files.archive import unpack_adapter
from adapters.files.checksums import BUSY, CHECKSUMS, is_whole, write_checksums
from adapters.files.json_text import LFS_POINTER
from adapters.files.landing import atomic_folder, land_folder, sync
from adapters.files.layout import CONFIG, WEIGHTS
from adapters.files.parts import join_parts
from adapters.files.shipped import SHIPPED, adapter_path, shipped_adapter

__all__ = [
    "BUSY",
    "CHECKSUMS",
    "CONFIG",
    "LFS_POINTER",
    "SHIPPED",
    "WEIGHTS",
    "adapter_path",
    "atomic_folder",
    "is_whole",
    "join_parts",
    "land_folder",
    "shipped_adapter",
    "sync",
    "unpack_adapter",
    "write_checksums",
]

"""Adapters on disk. This door is what other packages need of files in general; `load`, `save` and `Store` are in
`adapters`.
"""

from adapters.files.landing import atomic_folder, land_folder

__all__ = ["atomic_folder", "land_folder"]

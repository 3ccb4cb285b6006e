"""Adapters in other forms made into plain PEFT folders: `lora-fusion convert`."""

from adapters.convert.conversion import Conversion, convert
from adapters.convert.dora import MergeDora
from adapters.convert.source import RawAdapter, read_source

__all__ = ["Conversion", "MergeDora", "RawAdapter", "convert", "read_source"]

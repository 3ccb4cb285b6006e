"""The files of an adapter's folder, as PEFT names them."""

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PROVENANCE = "fusion.json"
"""Where a fusion comes from; PEFT has no such file."""

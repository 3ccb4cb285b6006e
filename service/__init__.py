"""The fusion service: OpenAI requests answered by any weighted combination of LoRA adapters.

async with open_service(read_settings()) as service:  # vLLM's engine runs inside
    async with service.pool.lease(service.names.look_up("0.6*task + 0.4*safety")) as lease:
        ...

`python -m service` serves it over HTTP; nothing here imports vLLM, torch or BentoML before it is used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

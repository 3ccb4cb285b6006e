"""A random adapter with the norms of a served one, module by module: the control of what any change would do.

It is made from the served adapter, exported over HTTP, and registered under a name of its own.
"""

import hashlib
import io
import json
import tarfile

import torch
from safetensors.torch import load as load_tensors, save as save_tensors

from eval_clients.endpoint import Endpoint, error_message
from eval_clients.errors import EndpointError
from eval_clients.sweeps.answer_only import single_model

CONFLICT = 409


def register_random_adapter(endpoint: Endpoint, adapter: str, *, answer_only: bool = False, seed: int = 0) -> str:
    """Register a random adapter with the norms of `adapter`, which acts where that does; its name. EndpointError when
    the service rejects it.
    """
    name = f"{adapter}-random-{seed}"
    config, tensors = export_adapter(endpoint, adapter, single_model(adapter, answer_only=answer_only))
    files = {"file": (f"{name}.tar", pack_adapter(config, randomize(tensors, seed)))}
    upload = {"data": {"name": name}, "files": files, "headers": {"x-fusion-upload": "1"}}
    response = endpoint.request("POST", "/adapters", **upload)
    if response.status_code == CONFLICT:  # made from an adapter that had this name before
        endpoint.request("DELETE", f"/adapters/{name}")
        response = endpoint.request("POST", "/adapters", **upload)
    if response.is_error:
        raise EndpointError(f"the service rejected the random control of {adapter!r}: {error_message(response)}")
    return name


def randomize(tensors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Gaussian factors of the same shapes, with the Frobenius norm of each module's update ΔW = BA preserved."""
    factors = {}
    for name in sorted(tensors):
        if ".lora_A." not in name:
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        a, b = tensors[name], tensors[other]
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        source = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        new_a = torch.randn(a.shape, generator=source) / a.shape[1] ** 0.5
        new_b = torch.randn(b.shape, generator=source)
        new_b *= (_update_norm(a, b) / _update_norm(new_a, new_b)).float()
        factors[name], factors[other] = new_a.to(a.dtype).contiguous(), new_b.to(b.dtype).contiguous()
    return factors


def _update_norm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """‖BA‖ from the Gram matrices: ‖BA‖² is the sum over the entries of (BᵀB) ∘ (AAᵀ), so BA is never formed."""
    a64, b64 = a.double(), b.double()
    return ((b64.T @ b64) * (a64 @ a64.T)).sum().clamp_min(0).sqrt()


def export_adapter(endpoint: Endpoint, adapter: str, model: str) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """Configuration and tensors of a served adapter, through a temporary profile of `model`."""
    profile = f"export-{hashlib.sha256(adapter.encode()).hexdigest()[:12]}"
    body = {"fusion": model, "description": "for a control"}
    response = endpoint.request("PUT", f"/fusions/{profile}", json=body)
    if not response.is_error:
        try:
            response = endpoint.request("GET", f"/fusions/{profile}/export")
        finally:
            endpoint.request("DELETE", f"/fusions/{profile}")
    if response.is_error:
        raise EndpointError(f"{adapter!r} cannot be exported: {error_message(response)}")
    config: dict[str, object] = {}
    tensors: dict[str, torch.Tensor] = {}
    with tarfile.open(fileobj=io.BytesIO(response.content)) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None  # the export holds plain files only
            if member.name.endswith("adapter_config.json"):
                config = json.loads(content.read())
            elif member.name.endswith("adapter_model.safetensors"):
                tensors = load_tensors(content.read())
    return config, tensors


def pack_adapter(config: dict[str, object], tensors: dict[str, torch.Tensor]) -> bytes:
    """A PEFT folder as a .tar archive."""
    buffer = io.BytesIO()
    files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save_tensors(tensors)}
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"adapter/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()

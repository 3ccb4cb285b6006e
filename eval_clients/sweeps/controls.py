"""Controls of a sweep: what a fusion must be better than before its effect can be laid to the safety adapter.

* the base and every adapter alone,
* the task's weight lowered as in the sweep, with no safety adapter,
* a random adapter of the same norm, module by module, in the safety adapter's place.

The random adapter is made from the served one (exported over HTTP) and registered under a name of its own.
"""

import hashlib
import io
import json
import re
import tarfile
from dataclasses import dataclass

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from eval_clients.endpoint import Endpoint, EndpointError, message_of

TERM = r"\s*(?:([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*)?([A-Za-z][\w.-]*)\s*"
SUM = re.compile(rf"{TERM}(?:\+{TERM})*")
CONFLICT = 409
EACH = re.compile(rf"(?:^|\+){TERM}")


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter of a plain sum."""

    weight: float
    name: str


def terms(recipe: str) -> list[Term]:
    """The terms of a plain sum such as `0.6*task + 0.4*safety`; empty when the text is any other recipe."""
    if not SUM.fullmatch(recipe):
        return []
    return [Term(float(weight or 1), name) for weight, name in EACH.findall(recipe)]


def plain(parts: list[Term]) -> str:
    """The recipe of a plain sum."""
    return " + ".join(f"{term.weight:.6g}*{term.name}" for term in parts)


def without(recipe: str, safety: str) -> str | None:
    """The sum with no safety term; None when nothing would be left or the recipe is no plain sum."""
    parts = [term for term in terms(recipe) if term.name != safety]
    return plain(parts) if parts else None


def _named(adapter: str) -> re.Pattern[str]:
    """Where a recipe names the adapter: not as part of another name, and not as an option or role (`safety=…`)."""
    return re.compile(rf"(?<![\w.-]){re.escape(adapter)}(?![\w.-]|\s*=)")


def uses(recipe: str, adapter: str) -> bool:
    """Whether the recipe, of any form, names the adapter."""
    return _named(adapter).search(recipe) is not None


def replaced(recipe: str, safety: str, other: str) -> str:
    """The recipe, of any form, with `other` in the safety adapter's place."""
    return _named(safety).sub(other, recipe)


def randomised(tensors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Gaussian factors of the same shapes, each module's update ΔW scaled to the Frobenius norm it had.

    ‖BA‖² is the sum over the entries of (BᵀB) ∘ (AAᵀ), so no update is made.
    """

    def norm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a64, b64 = a.double(), b.double()
        return ((b64.T @ b64) * (a64 @ a64.T)).sum().clamp_min(0).sqrt()

    made = {}
    for name in sorted(tensors):
        if ".lora_A." not in name:
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        a, b = tensors[name], tensors[other]
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        source = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        new_a = torch.randn(a.shape, generator=source) / a.shape[1] ** 0.5
        new_b = torch.randn(b.shape, generator=source)
        new_b *= (norm(a, b) / norm(new_a, new_b)).float()
        made[name], made[other] = new_a.to(a.dtype).contiguous(), new_b.to(b.dtype).contiguous()
    return made


def exported(endpoint: Endpoint, adapter: str) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """Configuration and tensors of a served adapter, through a profile that is made and removed again."""
    profile = f"export-{hashlib.sha256(adapter.encode()).hexdigest()[:12]}"
    body = {"fusion": f"1*{adapter}", "description": "for a control"}
    made = endpoint.ask("PUT", f"/fusions/{profile}", json=body)
    if made.is_error:
        raise EndpointError(f"{adapter!r} cannot be exported: {message_of(made)}")
    try:
        answer = endpoint.ask("GET", f"/fusions/{profile}/export")
    finally:
        endpoint.ask("DELETE", f"/fusions/{profile}")
    if answer.is_error:
        raise EndpointError(f"{adapter!r} cannot be exported: {message_of(answer)}")
    config: dict[str, object] = {}
    tensors: dict[str, torch.Tensor] = {}
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None  # the export holds plain files only
            if member.name.endswith("adapter_config.json"):
                config = json.loads(content.read())
            elif member.name.endswith("adapter_model.safetensors"):
                tensors = load_tensors(content.read())
    return config, tensors


def archive(config: dict[str, object], tensors: dict[str, torch.Tensor]) -> bytes:
    """A PEFT folder as .tar."""
    buffer = io.BytesIO()
    files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save_tensors(tensors)}
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"adapter/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def random_adapter(endpoint: Endpoint, adapter: str, seed: int = 0) -> str:
    """Registers a random adapter with the norms of `adapter`; its name. EndpointError when the service has no such."""
    name = f"{adapter}-random-{seed}"
    config, tensors = exported(endpoint, adapter)
    files = {"file": (f"{name}.tar", archive(config, randomised(tensors, seed)))}
    answer = endpoint.ask("POST", "/adapters", data={"name": name}, files=files)
    if answer.status_code == CONFLICT:  # one made from an adapter that had this name before
        endpoint.ask("DELETE", f"/adapters/{name}")
        answer = endpoint.ask("POST", "/adapters", data={"name": name}, files=files)
    if answer.is_error:
        raise EndpointError(f"the random control of {adapter!r} is refused: {message_of(answer)}")
    return name

"""Which role a caller needs for which route: one table for the service's own routes and vLLM's. What is not in it is
for admins.
"""

import re

from starlette.types import Scope

from service.callers import Role, find_caller
from service.errors import ApiError

LEAST: dict[tuple[str, str], Role] = {
    ("POST", "/v1/chat/completions"): "user",
    ("POST", "/v1/chat/completions/batch"): "user",
    ("POST", "/v1/completions"): "user",
    ("POST", "/v1/responses"): "user",
    ("POST", "/v1/messages"): "user",
    ("POST", "/v1/messages/count_tokens"): "user",
    ("POST", "/v1/chat/completions/render"): "user",
    ("POST", "/v1/completions/render"): "user",
    ("POST", "/tokenize"): "user",
    ("POST", "/detokenize"): "user",
    ("GET", "/tokenizer_info"): "user",
    ("GET", "/version"): "user",
    ("GET", "/health"): "user",  # without a key, too
    ("GET", "/ping"): "user",  # likewise
    ("GET", "/load"): "admin",  # of all clients together; vLLM's routers have the operator's key
    ("GET", "/v1/models"): "user",
    ("GET", "/v1/models/{name:path}"): "user",
    ("GET", "/v1/adapters"): "user",
    ("GET", "/v1/adapters/{name:name}"): "user",
    ("POST", "/v1/adapters"): "deployer",
    ("DELETE", "/v1/adapters/{name:name}"): "deployer",
    ("POST", "/v1/load_lora_adapter"): "deployer",
    ("POST", "/v1/unload_lora_adapter"): "deployer",
    ("POST", "/v1/fusions/plan"): "user",
    ("GET", "/v1/fusions"): "user",
    ("GET", "/v1/fusions/{profile:profile}"): "user",
    ("PUT", "/v1/fusions/{profile:profile}"): "deployer",
    ("DELETE", "/v1/fusions/{profile:profile}"): "deployer",
    ("POST", "/v1/fusions/{profile:name}/rollback"): "deployer",
    ("PUT", "/v1/fusions/{profile:name}/pin"): "deployer",
    ("DELETE", "/v1/fusions/{profile:name}/pin"): "deployer",
    ("GET", "/v1/fusions/{profile:name}/status"): "user",
    ("GET", "/v1/fusions/{profile:name}/export"): "deployer",  # the weights themselves
    ("GET", "/v1/scorecards"): "user",
    ("GET", "/v1/scorecards/{digest}"): "user",
    ("POST", "/v1/scorecards/{digest}"): "deployer",  # what policies rest on
    ("DELETE", "/v1/scorecards/{digest}"): "deployer",
    ("DELETE", "/v1/scorecards/{digest}/{scorecard_id}"): "deployer",
    ("GET", "/v1/evidence"): "user",
    ("GET", "/v1/state"): "deployer",  # of its own stacks; of everybody's for the operator's admins
    ("GET", "/v1/policy"): "user",
    ("GET", "/v1/whoami"): "user",
    ("GET", "/v1/keys"): "admin",
    ("POST", "/v1/keys"): "admin",
    ("POST", "/v1/keys/{key_id}/rotate"): "admin",
    ("DELETE", "/v1/keys/{key_id}"): "admin",
    ("GET", "/v1/audit"): "admin",
    ("GET", "/metrics"): "admin",  # of all tenants; FUSION_PUBLIC_METRICS opens it
}
"""(method, path as its route has it) → the least role; HEAD is what GET takes. A test compares it with all routes."""


def check_role(scope: Scope, path: str) -> None:
    """Raise `ApiError` 403 unless the caller may use the route that has `path`."""
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    needed, caller = LEAST.get((method, path), "admin"), find_caller(scope)
    if not caller.may(needed):
        path = re.sub(":[a-z]+}", "}", path)
        message = f"{method} {path} needs the role {needed!r}, the key {caller.key} has {caller.role!r}"
        raise ApiError(403, f"{message}; ask an admin for such a key.")

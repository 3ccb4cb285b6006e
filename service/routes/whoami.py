"""`/v1/whoami`: what the caller's key may do, and whom it asks."""

from service.routes import Sender, Service, make_router
from service.routes.state_schemas import CallerState

router = make_router("Keys", "/v1/whoami")


@router.get("")
async def show_caller(service: Service, caller: Sender) -> CallerState:
    """Show the role and the tenant of the key that the request came with, and the base that answers it."""
    return CallerState(
        object="caller",
        key=caller.key,
        role=caller.role,
        tenant=caller.tenant,
        keys=service.keys.ring.is_asked,
        base=service.names.base,
        max_model_len=service.engine.config.model_config.max_model_len,
        max_weight=service.names.max_weight,
    )

"""`/v1/policy`: which combinations may answer whom."""

from service.routes import Service, make_router
from service.routes.schemas import PolicyState

router = make_router("Policy", "/v1/policy")


@router.get("")
async def show_policy(service: Service) -> PolicyState:
    """Show the rules on combinations, and the contents that their adapters' names stand for now."""
    policy = service.policy
    return PolicyState(
        object="policy",
        id=policy.id,
        name=policy.rules.name,
        exempt=policy.rules.exempt,
        rules=policy.rules.list_rules(),
        adapters={name: min(policy.digests(name), default=None) for name in policy.rules.list_adapters()},
        warnings=policy.list_warnings(),
    )

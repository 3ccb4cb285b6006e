"""What a request of a limited caller takes of its limits, from when it comes until it is answered."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from service.engine.budgets import BudgetError
from service.engine.dry_run import RefusedError
from service.errors import ApiError
from service.ledger import Hold
from service.limits import Account
from service.metered import MeteredSend
from service.pool import Pool
from service.resolve import Fusion


async def admit(account: Account) -> Hold:
    """Count a request, and take one of the places of those in progress, which is given back by `settle(0)`.

    `ApiError` 429 when there is none, too many requests have come in the last minute, or no token is left.
    """
    request = await account.take("requests")
    try:
        (await account.take("tokens")).settle(0)  # nothing is made for a request that could compute nothing
        place = await account.take("concurrent")
    except BaseException:
        request.settle(0)
        raise
    request.settle(1)
    return place


@asynccontextmanager
async def count_build(account: Account | None, pool: Pool, fusion: Fusion) -> AsyncIterator[None]:
    """Have what the block makes or loads for `fusion` count against the limits of `account`."""
    if account is None or pool.is_ready(fusion):
        yield
        return
    hold, used = await account.take("builds"), 1
    try:
        yield
    except (ApiError, RefusedError):  # perhaps before anything was made
        used = int(pool.is_ready(fusion))
        raise
    finally:
        hold.settle(used)


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """A `Budget` of the engine: what is left of the caller's limits."""

    account: Account
    answer: MeteredSend

    async def reserve(self, tokens: int) -> Hold:
        """Reserve so many tokens for a generation; when there are not, the request is answered 429, or 400."""
        try:
            return await self.account.take("tokens", tokens)
        except ApiError as error:
            self.answer.answer_with(error)
            raise BudgetError(error.message, error.status) from error

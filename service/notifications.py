"""PostgreSQL's notifications of changes, heard on a connection of their own."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from service.database import CHANNEL

RETRY_S = 1.0
log = logging.getLogger("fusion")


async def hear_changes(options: Mapping[str, Any], notify: Callable[[], None]) -> None:
    """Call `notify` for every change of the registry, and whenever some may have been missed, until cancelled.

    `options` are psycopg's. A lost connection is made anew; whoever is notified asks now and then, too.
    """
    from psycopg import AsyncConnection, Error  # an extra, which SQLite needs not

    while True:
        try:
            async with await AsyncConnection.connect(**options, autocommit=True) as connection:
                await connection.execute(f"LISTEN {CHANNEL}")
                notify()
                async for _ in connection.notifies():
                    notify()
        except (Error, OSError) as error:
            log.info("changes of the registry are not heard: %s", type(error).__name__)
        await asyncio.sleep(RETRY_S)

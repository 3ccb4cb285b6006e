"""The registry's schema, migration by migration (Alembic): `versions/` has one file each, in both databases the same.

Replicas are renewed one after the other, so a migration must leave tables that the version before can go on using.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection


class NewerSchemaError(RuntimeError):
    """A newer version of this software has migrated the database."""


def migrate(connection: Connection) -> None:
    """Bring the tables to the newest schema; a database of any earlier version keeps its rows.

    NewerSchemaError, with nothing changed, when the schema is one that this version does not know.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    found = MigrationContext.configure(connection).get_current_heads()
    scripts = ScriptDirectory.from_config(config)
    known = {script.revision for script in scripts.walk_revisions()}
    if strange := [revision for revision in found if revision not in known]:
        newest = scripts.get_current_head()
        raise NewerSchemaError(f"its schema is {strange[0]!r}, the newest that this version knows is {newest!r}")
    if found != (scripts.get_current_head(),):
        command.upgrade(config, "head")

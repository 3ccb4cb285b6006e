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


def migrate(connection: Connection, revision: str = "head") -> None:
    """Bring the tables to the newest schema, or to an earlier `revision`; a database of any version before it keeps its
    rows.

    NewerSchemaError, with nothing changed, when the schema is one that this version does not know.
    """
    config = _configure()
    config.attributes["connection"] = connection
    found = MigrationContext.configure(connection).get_current_heads()
    for one in found:
        check_known(one)
    if found != (ScriptDirectory.from_config(config).get_current_head(),):
        command.upgrade(config, revision)


def check_known(revision: str) -> None:
    """NewerSchemaError unless this version knows the schema `revision`; "" is that of tables without migrations."""
    scripts = ScriptDirectory.from_config(_configure())
    if revision and revision not in {script.revision for script in scripts.walk_revisions()}:
        newest = scripts.get_current_head()
        raise NewerSchemaError(f"its schema is {revision!r}, the newest that this version knows is {newest!r}")


def find_revision(connection: Connection) -> str:
    """The schema of a database, "" when it has tables without migrations; NewerSchemaError for an unknown one."""
    found = MigrationContext.configure(connection).get_current_heads()
    for one in found:
        check_known(one)
    return found[0] if found else ""


def _configure() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config

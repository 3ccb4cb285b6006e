"""What Alembic runs around migrations: on the connection that `migrate` has, in its transaction."""

from alembic import context

from service.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
with context.begin_transaction():
    context.run_migrations()

"""SqlStore: idempotency, inbox and outbox in the application's own database, by SQLAlchemy. Needs `pip install "msgbus[sql]"`."""

try:
    import sqlalchemy.ext.asyncio as _  # noqa: F401  SQLAlchemy, with what its asyncio side needs
except ImportError as error:
    raise ImportError('msgbus.stores.sql needs SQLAlchemy: pip install "msgbus[sql]", and the driver of your database') from error

from msgbus.stores.sql.schema import OutboxTables as OutboxTables
from msgbus.stores.sql.schema import make_outbox_tables as make_outbox_tables
from msgbus.stores.sql.store import SqlStore as SqlStore

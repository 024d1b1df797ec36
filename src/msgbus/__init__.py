"""msgbus: one typed interface for messages between services; one behaviour on every broker.

Errors are in `msgbus.errors`, settings in `msgbus.settings`, stores in `msgbus.stores`, what adapters implement in `msgbus.contract`.
"""

from msgbus.batch import Batch
from msgbus.bus import Bus
from msgbus.context import Context, SyncContext
from msgbus.contract.envelope import Envelope
from msgbus.contract.outcome import Dead, Done, Dropped, Outcome, Released, RetryAfter
from msgbus.errors import BatchFailed, Drop, MsgbusError, Reject, RetryLater
from msgbus.middleware.base import Middleware
from msgbus.publisher import Publisher
from msgbus.publishing import Publishes, PublishManyOptions, PublishOptions, Receipt, SyncPublishes
from msgbus.retry import Retry
from msgbus.router import Router
from msgbus.topic import Topic

__all__ = [
    "Batch",
    "BatchFailed",
    "Bus",
    "Context",
    "Dead",
    "Done",
    "Drop",
    "Dropped",
    "Envelope",
    "Middleware",
    "MsgbusError",
    "Outcome",
    "PublishManyOptions",
    "PublishOptions",
    "Publisher",
    "Publishes",
    "Receipt",
    "Reject",
    "Released",
    "Retry",
    "RetryAfter",
    "RetryLater",
    "Router",
    "SyncContext",
    "SyncPublishes",
    "Topic",
]

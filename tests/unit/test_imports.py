"""What `import msgbus` gives, and what it does not load."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import msgbus

HEAVY = [
    "aio_pika",
    "aiokafka",
    "aiormq",
    "click",
    "django",
    "fastapi",
    "msgbus.runtime",
    "msgbus.settings",
    "msgbus.testing",
    "msgbus_memory",
    "msgbus_rabbitmq",
    "opentelemetry",
    "prometheus_client",
    "pydantic_settings",
    "pytest",
    "redis",
    "rich",
    "sqlalchemy",
    "starlette",
    "typer",
]
PUBLIC = [
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


def loaded_by(program: str) -> set[str]:
    """The names of the modules that a fresh interpreter has loaded after the program."""
    command = [sys.executable, "-c", f"{program}\nimport sys\nprint(*sys.modules, sep='\\n')"]
    return set(subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())


def test_import_is_light() -> None:
    """`import msgbus` loads no client library, no SQLAlchemy, OpenTelemetry, Typer, rich or pydantic-settings, and no adapter."""
    assert loaded_by("import msgbus") & set(HEAVY) == set()


def test_registering_is_light() -> None:
    """Neither do topics, a bus and its subscriptions: what a module has at its top level when it is imported."""
    program = """
import msgbus
bus = msgbus.Bus("memory://", service="shop")
topic = msgbus.Topic("orders", dict)
@bus.subscribe(topic)
async def handle(message: dict) -> None: ...
"""
    assert loaded_by(program) & set(HEAVY) == set()


def test_the_public_names() -> None:
    """`__all__` is the list of public names: this one, sorted, at most 40, each of them there. A change to it is a decision."""
    assert msgbus.__all__ == PUBLIC
    assert sorted(PUBLIC) == PUBLIC
    assert len(PUBLIC) <= 40
    assert all(hasattr(msgbus, name) for name in PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_explained(name: str) -> None:
    """What is public has a docstring; type aliases, which can have none, aside."""
    value = getattr(msgbus, name)
    assert not isinstance(value, type) or value.__doc__


@pytest.mark.parametrize("package", ["msgbus", "msgbus_memory"])
def test_types_are_shipped(package: str) -> None:
    """Type checkers read our annotations: each package has its `py.typed`."""
    file = import_module(package).__file__
    assert file is not None
    assert (Path(file).parent / "py.typed").is_file()

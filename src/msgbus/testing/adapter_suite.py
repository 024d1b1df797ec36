"""The conformance suite: what every adapter must do, whatever the broker. Import everything of it beside a fixture `broker`.

Each test's docstring states the clause of the contract that it holds. A test is skipped only where it needs a capability that the
adapter does not claim; a capability that is claimed and false fails it.
"""

from __future__ import annotations

import importlib

from msgbus.testing import SUITE_MODULES
from msgbus.testing.stage import REGISTRY

for _name in SUITE_MODULES:
    importlib.import_module(f"msgbus.testing.suite_{_name}")

globals().update({f"test_{name}": test for name, test in REGISTRY.items()})

__all__ = [f"test_{name}" for name in REGISTRY]  # pyright: ignore[reportUnsupportedDunderAll]  as many as there are

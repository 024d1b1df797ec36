"""Tests that ship with msgbus: what every adapter and every idempotency store must pass. Needs pytest: `pip install "msgbus[testing]"`.

A third party's whole test file for an adapter:

```python
import pytest

from msgbus.testing.adapter_suite import *  # noqa: F403
from msgbus.testing.stage import Broker


@pytest.fixture
def broker() -> Broker:
    return Broker("mybroker://localhost", crash=my_adapter_dies)
```
"""

try:
    import pytest
except ImportError as error:
    raise ImportError('msgbus.testing needs pytest: pip install "msgbus[testing]"') from error

SUITE_MODULES = (
    "publishing", "content", "groups", "consuming", "ordering", "retrying", "dead_letters", "lifecycle", "operating", "refusals",
    "storing",
)  # fmt: skip
"""The modules of `msgbus.testing` that hold the suite's tests, in the order they run."""

pytest.register_assert_rewrite(
    *(f"msgbus.testing.suite_{name}" for name in SUITE_MODULES),
    "msgbus.testing.stage",
    "msgbus.testing.steps",
    "msgbus.testing.history",
    "msgbus.testing.store_suite",
)

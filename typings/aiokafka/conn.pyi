"""A single connection, of which msgbus_kafka asks why there is none."""

from collections.abc import Sequence
from typing import Any

class AIOKafkaConnection:
    def close(self) -> object: ...

def collect_hosts(hosts: Sequence[str], randomize: bool = True) -> list[tuple[str, int, int]]: ...
async def create_conn(host: str, port: int, **options: Any) -> AIOKafkaConnection: ...

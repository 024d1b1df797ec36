"""What `declare` would make, as a shell script for Kafka's own tools."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from msgbus_kafka.cluster import NewTopic
from msgbus_kafka.names import SOON, history_id

_HEAD = """\
#!/bin/sh
# What the program needs at Kafka. Usage: sh FILE --bootstrap-server HOST:PORT [--command-config FILE]. Twice is once; nothing is altered.
set -eu
topics="${KAFKA_TOPICS:-kafka-topics.sh} $*"
groups="${KAFKA_CONSUMER_GROUPS:-kafka-consumer-groups.sh} $*"
known=$($groups --list)
has() { echo "$known" | grep -qxF "$1"; }
topic() { # NAME PARTITIONS REPLICAS [--config NAME=VALUE ...]
  name=$1 partitions=$2 replicas=$3; shift 3
  $topics --create --if-not-exists --topic "$name" --partitions "$partitions" --replication-factor "$replicas" "$@"
}
group() { # GROUP TOPIC MARK FIRST LATER: where it starts, as the topic's first group, which is marked, and as a later one
  if has "$1"; then return; fi
  start=$4; if has "$3"; then start=$5; fi
  $groups --reset-offsets --execute --group "$1" --topic "$2" --topic "$2SOON" --topic "$1SOON" $start
  if ! has "$3"; then
    $groups --reset-offsets --execute --group "$3" --topic "$2SOON" --to-earliest
    known="$known
$3"
  fi
}
""".replace("SOON", SOON)


def shell(topics: Sequence[NewTopic], groups: Sequence[tuple[str, str, str, float | None]]) -> str:
    """The script that makes them. Of a group: its id, the topic of its level, where it starts, what the topic retains in seconds."""
    lines = [_HEAD]
    for new in topics:
        configs = [f"--config={name}={value}" for name, value in new.configs.items()]
        lines.append(shlex.join(["topic", new.name, str(new.partitions), str(new.replication), *configs]))
    for group, topic, start, retain in groups:
        later = "--to-latest" if retain is None or start == "latest" else f"--by-duration PT{retain:.0f}S"
        first = "--to-latest" if start == "latest" else "--to-earliest"
        lines.append(shlex.join(["group", group, topic, history_id(topic), first, later]))
    return "\n".join(lines) + "\n"

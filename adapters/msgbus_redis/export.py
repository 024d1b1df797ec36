"""What `declare` would run, as a shell script for redis-cli."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from msgbus_redis.connections import Command

_HEAD = """\
#!/bin/sh
# What the program needs at Redis. Usage: sh FILE [options of redis-cli, such as -h HOST -p PORT]. Twice is once; nothing is altered.
set -eu
redis="${REDIS_CLI:-redis-cli} $*"
step() {
  answer=$($redis "$@" 2>&1) || true
  case $answer in
    OK|0|1|2|BUSYGROUP*) echo "$*: is there" ;;
    *) echo "$*: $answer" >&2; exit 1 ;;
  esac
}
"""


def shell(commands: Iterable[Command]) -> str:
    """The script that carries out these commands, each of which may have been carried out before."""
    steps = (" ".join(shlex.quote(str(word)) for word in ("step", *command)) for command in commands)
    return "\n".join((_HEAD, *steps, ""))

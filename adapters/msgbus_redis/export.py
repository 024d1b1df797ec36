"""What `declare` would run, as a shell script for redis-cli: the same Lua with the same arguments."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from msgbus_redis import scripts
from msgbus_redis.connections import Command

_HEAD = """\
#!/bin/sh
# What the program needs at Redis. Usage: sh FILE [options of redis-cli, such as -h HOST -p PORT]. Twice is once; nothing is altered.
set -eu
redis="${REDIS_CLI:-redis-cli} $*"
step() {
  what=$1; shift
  answer=$($redis EVAL "$@")
  case $answer in
    ok*) echo "$what: is there" ;;
    *) echo "$what: $answer" >&2; exit 1 ;;
  esac
}
"""
_NAMES = {scripts.DECLARE: "declare_topic", scripts.DECLARE_GROUP: "declare_group"}
_SOURCES = {scripts.SHA[source]: source for source in _NAMES}


def shell(steps: Sequence[tuple[str, Command]]) -> str:
    """The script that carries out these steps: what each is for, and the command that `declare` sends."""
    lines = [_HEAD]
    lines += [f"{name}() {{ cat <<'LUA'\n{source.strip()}\nLUA\n}}\n" for source, name in _NAMES.items()]
    for what, (_, sha, *rest) in steps:
        words = " ".join(shlex.quote(str(word)) for word in rest)
        lines.append(f'step {shlex.quote(what)} "$({_NAMES[_SOURCES[str(sha)]]})" {words}')
    return "\n".join(lines) + "\n"

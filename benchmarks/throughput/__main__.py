"""`python -m benchmarks.throughput CONTENDER TASK URL COUNT WORK SHARDS`: one run, a process of its own. Prints what it found as JSON."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import uuid
from dataclasses import asdict

from benchmarks.throughput.measuring import Task


def main() -> None:
    """Runs what the command line names."""
    contender, what, url, count, work, shards = sys.argv[1:]
    task = Task(url, f"bench-{uuid.uuid4().hex[:12]}", int(count), float(work), int(shards) or None)
    run = getattr(importlib.import_module(f"benchmarks.throughput.{contender}"), what)
    print(json.dumps(asdict(asyncio.run(run(task)))))


if __name__ == "__main__":
    main()

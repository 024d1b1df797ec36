"""Installs the brokers that tests will start as processes, where that may be done: Debian's packages by root, the jars of Kafka by anybody.

`make test` runs it first, and `make shop` for one of them. It says what it does, and leaves alone what the environment names or a
container will be. What it cannot install is no failure here: the tests that need it say so, and fail or are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.brokers import JARS, KAFKA_VERSION, RECIPES, lacks, no_engine, variable

POM = Path(__file__).parent / "kafka-pom.xml"
PACKAGES = {
    "redis": ("redis-server",),
    "redis-packaged": ("redis-server",),
    "rabbitmq": ("rabbitmq-server",),
    "rabbitmq-packaged": ("rabbitmq-server",),
    "kafka": ("default-jre-headless", "maven"),
    "postgres": ("postgresql",),
    "mysql": ("mariadb-server",),
}
"""Debian's. It has no package of Valkey before its 13th version; where there is one, it brings the program that is looked for."""


def wanted(name: str) -> bool:
    """Whether a broker will be a process, and is not there yet."""
    has_image = RECIPES[name].image is not None or variable(name, "IMAGE") in os.environ
    return variable(name, "URL") not in os.environ and not (has_image and not no_engine()) and bool(lacks(name))


def run(*command: str, **variables: str) -> bool:
    """Runs a command. Its output is shown when it fails."""
    print("  " + " ".join(command), flush=True)
    done = subprocess.run(command, env=os.environ | variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode == 0


def install_packages(packages: list[str]) -> None:
    """Of Debian. Their services are not started: tests start the programs themselves."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        print(f"  not root, or no apt-get: {' '.join(packages)} are not installed")
        return
    quiet = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    if run("apt-get", "update"):
        run("apt-get", "install", "--yes", "--no-install-recommends", *packages, **quiet)


def copy_jars() -> None:
    """Of Kafka, by Maven."""
    if shutil.which("mvn") is None:
        print("  no mvn: the jars of Kafka are not copied")
        return
    new = JARS.with_name("kafka.new")
    goal = ("dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={new}", f"-Dkafka.version={KAFKA_VERSION}")
    if run("mvn", "--quiet", "--batch-mode", "--file", str(POM), *goal):
        new.rename(JARS)  # all of them or none


def main(asked: Sequence[str] = ()) -> None:
    """Installs what is missing of the brokers asked for, by default of all."""
    names = [name for name in asked or RECIPES if wanted(name)]
    packages = sorted({package for name in names for package in PACKAGES.get(name, ())})
    if shutil.which("mvn") is not None and shutil.which("java") is not None:
        packages = [package for package in packages if package not in PACKAGES["kafka"]]
    if packages or "kafka" in names:
        print(f"Installing: {', '.join(names)}", flush=True)
    if packages:
        install_packages(packages)
    if "kafka" in names:
        copy_jars()
    for name in names:
        if why := lacks(name):
            print(f"  {name} will be missing: {why}")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])

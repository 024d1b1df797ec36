"""Redis where it is not one plain server, small: a server with TLS, a master with replica and Sentinels, a cluster of three masters.

Each is one broker of `tests.brokers`, however many servers it has: a shell script that starts them, in one container or in one group of
processes. They tell their clients, and each other, where they are, so that they have the same ports in the container as outside of it.
"""

from __future__ import annotations

import os
import shlex
import ssl
from contextlib import suppress

from tests.brokers import RECIPES, Recipe, variable
from tests.certificates import Authority

PASSWORD = "p@ss/w%rd:#?&"
"""Of the servers; what is special in a URL is in it."""
SENTINELS_PASSWORD = "an other+1"


AUTHORITY = Authority()
"""Of the servers' certificate, and of a client's."""


def _tls() -> Recipe:
    """One server that speaks nothing but TLS. Whether it asks for a client's certificate is changed while it runs."""
    start = f"exec {_SERVER} {_TLS} --tls-port {{port}} --dir {{folder}} --requirepass {shlex.quote(PASSWORD)}"
    return _recipe("rediss://127.0.0.1:{port}/0", 1, [_PEMS, start], _client_hello(), b"\x16\x03")


def _sentinel() -> Recipe:
    """A master at `{port}`, its replica at the next one, and three Sentinels, two of which must agree; all of them with TLS and passwords.

    The master does not come back when it is killed, until there is a file `again`: then it comes as the other's replica.
    """
    secret = shlex.quote(PASSWORD)
    server = f"{_SERVER} {_TLS} --requirepass {secret} --masterauth {secret} --replica-announce-ip 127.0.0.1 --repl-diskless-sync-delay 0"
    replica = f"{server} --tls-port {{port1}} --dir {{folder}}/b --replicaof 127.0.0.1 {{port}}"
    master = f"{server} --tls-port {{port}} --dir {{folder}}/a"
    told = f"REDISCLI_AUTH={secret} redis-cli --tls --cacert ca.pem -h 127.0.0.1 -p {{port1}} info replication"
    steps = [_PEMS, f"mkdir -p a b; {replica} & {master} &"]
    # A Sentinel that found no replica would look again after ten seconds.
    steps.append(f"until {told} | grep -q master_link_status:up; do sleep 0.1; done")
    for number in (2, 3, 4):
        lines = (
            f"port 0 | tls-port {{port{number}}} | sentinel announce-ip 127.0.0.1 | requirepass {_quoted(SENTINELS_PASSWORD)}"
            f" | sentinel sentinel-pass {_quoted(SENTINELS_PASSWORD)} | sentinel monitor main 127.0.0.1 {{port}} 2"
            f" | sentinel auth-pass main {_quoted(PASSWORD)} | sentinel down-after-milliseconds main 2500"
            " | sentinel failover-timeout main 4000"
        )
        steps.append(f"printf '%s\\n' {' '.join(shlex.quote(line) for line in lines.split(' | '))} > {number}.conf")
        steps.append(f"redis-server {number}.conf --sentinel --bind $BIND --protected-mode no {_TLS.removeprefix('--port 0')} &")
    steps.append(f"until [ -e again ]; do sleep 0.1; done; {master} --replicaof 127.0.0.1 {{port1}}; wait")
    hosts = ",".join(f"127.0.0.1:{{port{number}}}" for number in (2, 3, 4))
    return _recipe(f"redis+sentinel://{hosts}/main/0", 5, steps, _client_hello(), b"\x16\x03")


def _cluster() -> Recipe:
    """Three masters without replicas, at `{port}` and the two above it."""
    ports = ("{port}", "{port1}", "{port2}")
    steps = [
        f"mkdir -p {{folder}}/{port}; {_SERVER} --port {port} --cluster-port {{port{number}}} --dir {{folder}}/{port}"
        " --cluster-enabled yes --cluster-require-full-coverage no --cluster-node-timeout 2000 --cluster-announce-ip 127.0.0.1 &"
        for number, port in enumerate(ports, 3)
    ]
    steps += [f"until redis-cli -p {port} ping; do sleep 0.1; done" for port in ports]
    nodes = " ".join(f"127.0.0.1:{port}" for port in ports)
    steps.append(f"[ -e formed ] || redis-cli --cluster create {nodes} --cluster-yes && touch formed; wait")
    welcome = b"cluster_known_nodes:3\r\ncluster_size:3"
    return _recipe("redis+cluster://127.0.0.1:{port},127.0.0.1:{port1}/", 3, steps, b"CLUSTER INFO\r\n", welcome)


_SERVER = "redis-server --bind $BIND --protected-mode no --save '' --appendonly yes"
_TLS = "--port 0 --tls-cert-file {folder}/own.pem --tls-key-file {folder}/key.pem --tls-ca-cert-file {folder}/ca.pem" \
    " --tls-auth-clients no --tls-replication yes"  # fmt: skip
_PEMS = "; ".join(f'printf %s "${part}" > {part}.pem' for part in ("ca", "own", "key"))


def _recipe(url: str, ports: int, steps: list[str], hello: bytes, welcome: bytes) -> Recipe:
    script = "\n".join(["cd {folder}", *steps])
    own = AUTHORITY.issue("redis")
    variables = {"ca": AUTHORITY.pem, "own": own.certificate, "key": own.key}
    return Recipe(
        url=url,
        hello=hello,
        welcome=welcome,
        ports=(0,) * ports,
        image=os.environ.get(variable("redis", "IMAGE")) or RECIPES["redis"].image,
        program=RECIPES["redis"].program,
        command=f"sh -c {shlex.quote(script)}",
        process=script,
        variables={**variables, "BIND": "0.0.0.0"},  # of the container: published on 127.0.0.1 alone
        process_variables={**variables, "BIND": "127.0.0.1"},
    )


def _quoted(text: str) -> str:
    """As a configuration file has it."""
    return f'"{text}"'


def _client_hello() -> bytes:
    """What a TLS client says first."""
    says = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(ssl.MemoryBIO(), says, server_hostname="127.0.0.1").do_handshake()
    return says.read()


RECIPES.update({"redis-tls": _tls(), "redis-sentinel": _sentinel(), "redis-cluster": _cluster()})

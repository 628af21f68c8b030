"""SQL over predictions: what it answers, and that it can neither write nor reach anything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from carray import queries
from carray.classify.predictions_folder import as_version, prediction_schema
from carray.core.errors import SchemaError, SettingsError
from carray.core.tables import table_from_rows, write_table
from carray.queries import sql as module
from carray.testing.predictions import NOON, row, write_predictions


@pytest.fixture(params=["read by DuckDB", "read through Arrow [1]"])
def predictions(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Write a run into a folder that DuckDB reads itself, and into one whose name it would take for a pattern."""
    return write_predictions(str(tmp_path / "it's one" / request.param))


def test_sql_answers_with_whole_numbers_and_utc(predictions: str) -> None:
    answer = queries.query(
        predictions, "SELECT make, sum(year) AS years, max(scored_at) AS at FROM predictions GROUP BY 1"
    )
    years = dict(zip(answer["make"].fillna(""), answer["years"], strict=True))
    assert years["Audi"] == 4024
    assert answer["years"].dtype == "Int64"
    assert answer["at"].max() == pd.Timestamp(NOON)


@pytest.mark.parametrize(
    "sql",
    [
        "FROM predictions",
        "WITH scored AS (SELECT * FROM predictions WHERE status = 'ok') SELECT count(*) FROM scored;",
        "DESCRIBE predictions",
        "SUMMARIZE predictions",
        "PIVOT predictions ON status IN ('ok') USING count(*)",
        "SELECT uri, unnest(top5_labels) FROM predictions",
        "SELECT count(*) FROM predictions, range(3)",
        "SELECT uri FROM predictions UNION ALL (SELECT uri FROM predictions QUALIFY row_number() OVER () = 1)",
    ],
)
def test_every_spelling_of_a_reading_passes(predictions: str, sql: str) -> None:
    assert len(queries.query(predictions, sql))


def test_another_run_and_labels_are_tables_too(placed: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("uri,label\na,BMW X5 SUV 2007\n")
    answer = queries.query(
        placed,
        "SELECT p.uri, o.score, l.label FROM predictions p JOIN other o USING (uri) JOIN labels l USING (uri)",
        other=placed,
        labels=str(tmp_path / "labels.csv"),
    )
    assert answer["uri"].tolist() == [f"{tmp_path}/a"]
    assert answer["label"].tolist() == ["BMW X5 SUV 2007"]


def test_embeddings_are_numbers_where_duckdb_reads_and_in_nobodys_way_elsewhere(predictions: str) -> None:
    embedded = row("z", embedding=[np.float16(0.5), np.float16(1.5)])
    for path in Path(predictions).glob("*.parquet"):
        table = as_version(table_from_rows([embedded], prediction_schema(["embedding"])), 1)
        write_table(table, str(path), kind="predictions", version=1)
    assert queries.by_make(predictions)["images"].tolist() == [2]
    if "Arrow" in predictions:
        with pytest.raises(SettingsError, match="embedding"):
            queries.query(predictions, "SELECT embedding FROM predictions")
        return
    answer = queries.query(predictions, "SELECT embedding, list_sum(embedding) AS total FROM predictions")
    assert answer["total"].tolist() == [2.0, 2.0] and answer["embedding"][0].tolist() == [0.5, 1.5]


def test_the_answer_is_cut_where_asked(predictions: str) -> None:
    assert len(queries.query(predictions, "SELECT uri FROM predictions", limit=3)) == 3


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT maker FROM predictions", "maker"),
        ("SELECT * FROM elsewhere", "elsewhere"),
        ("SET threads = 1", "it is SET"),
        ("", "it is nothing"),
        ("-- nothing", "it is nothing"),
        ("SELECT 1; SELECT 2", "it is SELECT and SELECT"),
        ("PRAGMA database_list", "it is PRAGMA"),
        ("CREATE TABLE x AS SELECT 1", "it is CREATE"),
        ("SELECT score::INTEGER[] FROM predictions", "cast"),
    ],
)
def test_refused_sql_is_one_sentence(predictions: str, sql: str, words: str) -> None:
    with pytest.raises(SettingsError, match=f"(?i){words}") as caught:
        queries.query(predictions, sql)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


ATTACKS = [
    "SELECT * FROM read_text('{secret}')",
    "SELECT * FROM '{secret}'",
    "SELECT * FROM '{folder}/../secret.csv'",
    "SELECT * FROM read_csv('{secret}')",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT (SELECT max(content) FROM read_text('{secret}'))",
    "SELECT * FROM predictions WHERE uri IN (SELECT content FROM read_text('{secret}'))",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM query('SELECT * FROM read_text(''{secret}'')')",
    "SELECT * FROM query_table(['{secret}'])",
    "SELECT * FROM parquet_metadata('{folder}/_carray/hidden.parquet')",
    "SELECT * FROM '{folder}/_carray/hidden.parquet'",
    "SELECT * FROM '{folder}/link.parquet'",
    "FROM '{folder}/**/*.parquet'",
    "COPY predictions TO '{secret}'",
    "COPY predictions TO '{data}' (USE_TMP_FILE false)",
    "WITH x AS (COPY (SELECT 1) TO '{data}' (USE_TMP_FILE false)) SELECT 1",
    "SELECT * FROM (WITH x AS (COPY (SELECT 1) TO '{data}' (USE_TMP_FILE false)) SELECT 1)",
    "SELECT * FROM query('WITH x AS (COPY (SELECT 1) TO ''{data}'' (USE_TMP_FILE false)) SELECT 1')",
    "WITH x AS (INSERT INTO predictions (uri) VALUES ('h') RETURNING uri) SELECT * FROM x",
    "WITH x AS (DELETE FROM predictions RETURNING uri) SELECT * FROM x",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{data}' (USE_TMP_FILE false)",
    "SELECT * FROM enable_logging(storage = 'file', storage_config = {{'path': '{folder}'}})",
    "ATTACH '{secret}' AS other",
    "ATTACH '{data}' AS other",
    "EXPORT DATABASE '{folder}/export'",
    "SET enable_external_access = true; SELECT * FROM read_text('{secret}')",
    "INSTALL httpfs",
    "LOAD httpfs",
    "DELETE FROM predictions",
    "DROP VIEW predictions",
    "SELECT * FROM duckdb_secrets()",
]


@pytest.mark.parametrize("sql", ATTACKS)
def test_sql_reaches_no_other_file_and_changes_none(predictions: str, tmp_path: Path, sql: str) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("word\nhunter2\n")
    folder = Path(predictions)
    for hidden in (folder / "_carray" / "hidden.parquet", tmp_path / "elsewhere.parquet"):
        pd.DataFrame({"word": ["hunter2"]}).to_parquet(hidden)
    data = queries.open_predictions(predictions)  # opened before the link is there, which is then no file of the run
    (folder / "link.parquet").symlink_to(tmp_path / "elsewhere.parquet")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    statement = sql.format(secret=secret, folder=_inside(folder), data=_inside(data.files[0]))
    with pytest.raises(SettingsError) as caught, module.connect({"predictions": data}) as connection:
        module.check_sql(connection, statement)
        connection.sql(statement).to_arrow_table()
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def _inside(path: object) -> str:
    return str(path).replace("'", "''")


def test_duckdb_alone_would_let_a_select_write_a_file_that_it_may_read(predictions: str) -> None:
    """Shows why the guard is there; should DuckDB ever refuse this, the guard may become smaller."""
    data = queries.open_predictions(predictions)
    if not module._own_files(data):
        pytest.skip("read through Arrow, DuckDB may open no file at all")
    before = Path(data.files[0]).read_bytes()
    with module.connect({"predictions": data}) as connection:
        connection.execute(f"WITH x AS (COPY (SELECT 1) TO '{_inside(data.files[0])}' (USE_TMP_FILE false)) SELECT 1")
    assert Path(data.files[0]).read_bytes() != before


def test_a_damaged_file_is_named(predictions: str) -> None:
    Path(predictions, "part-000001.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(SchemaError, match=r"part-000001\.parquet is not readable Parquet") as caught:
        queries.query(predictions, "SELECT max(score) FROM predictions")
    assert "\n" not in str(caught.value)


def test_folders_named_like_hive_partitions_add_no_column(tmp_path: Path) -> None:
    folder = write_predictions(str(tmp_path / "make=Fiat"))
    assert queries.by_make(folder)["make"].iloc[0] == "Audi"


def test_what_exceeds_memory_spills_into_a_folder_that_is_removed(
    predictions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    spilled = tmp_path / "spilled"
    spilled.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spilled))
    monkeypatch.setattr(module, "MEMORY_BYTES", 64 * 2**20)
    seen: list[Path] = []
    with module.connect({"predictions": queries.open_predictions(predictions)}) as connection:
        many = "SELECT md5(i::VARCHAR) AS word FROM predictions, range(200000) numbers(i) ORDER BY word"
        rows = connection.execute(f"SELECT count(*), max(word) FROM ({many} LIMIT 1300000)").fetchall()
        seen += [path for path in spilled.rglob("*") if path.is_file()]
    assert rows[0][0] == 1_300_000
    assert seen, "64 MB are not enough for 1.4 million words"
    assert list(spilled.iterdir()) == []

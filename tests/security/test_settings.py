"""Settings files: YAML tags make no objects, aliases cannot exhaust memory, and URIs with credentials are refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from carray.classify.predictions_folder import ClassifySettings
from carray.classify.sources import open_source
from carray.core.errors import SchemaError, SettingsError
from carray.core.settings import load_settings
from carray.core.store.files import absolute
from carray.core.store.s3 import s3_endpoint
from carray.manifest.tables import read_source_table
from carray.search.space import TuneSettings

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + chr(ord(name) - 1)] * 10)}]\n" for name in "bcdefghij"
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join(['*' + chr(ord(name) - 1)] * 10)}]}}\n" for name in "bcdefghij"
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        MERGES,
        "search: &s {trials: *s}",
        "search: !!python/object/apply:os.system [touch sprung]",
        "search: !!python/name:os.system ''",
        "[" * 50_000,
        "search: 2001-13-45",
        "search: !!bool nonsense",
        "search: !!timestamp nonsense",
        "search: " + "9" * 5_000,
        "\0",
    ],
    ids=["laughs", "merges", "endless", "object", "name", "deep", "date", "bool", "timestamp", "digits", "zero"],
)
def test_a_hostile_file_of_settings_is_a_sentence_at_once(tmp_path: Path, text: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(SettingsError) as caught:
        load_settings(TuneSettings, config="settings.yaml")
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 2_000 and str(caught.value).endswith(".")
    assert not (tmp_path / "sprung").exists()


def test_aliases_that_a_person_writes_are_read(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(
        "families:\n  cnn: &base {share: 0.3, space: {learning_rate: [0.1, 0.2]}}\n"
        "  transfer: {<<: *base, share: 0.7}\n"
    )
    families = load_settings(TuneSettings, config=f"{tmp_path}/settings.yaml").families
    assert families["transfer"].space == families["cnn"].space
    assert (families["cnn"].share, families["transfer"].share) == (0.3, 0.7)


SECRET = "wJalrXUtnFEMI"


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://AKIAEXAMPLE:{SECRET}@bucket/key.jpg",
        f"https://user:{SECRET}@host/a.jpg",
        f"https://host/a.jpg?X-Amz-Signature={SECRET}",
        f"gs://{SECRET}@bucket/a.jpg",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(tmp_path: Path, uri: str) -> None:
    (tmp_path / "t.csv").write_text(f"uri,label\n{uri},x\n")

    def score_table() -> None:
        import threading

        source = open_source(f"{tmp_path}/t.csv", ClassifySettings(), uses_boxes=False)
        source.list(lambda piece: None, gaps=[("", None)], threads=1, stop=threading.Event())

    for read in (lambda: absolute(uri), lambda: read_source_table(f"{tmp_path}/t.csv"), score_table):
        with pytest.raises((SettingsError, SchemaError), match="carries credentials|has the scheme") as caught:
            read()
        assert SECRET not in str(caught.value)


def test_credentials_in_the_stores_address_are_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET}@127.0.0.1:9000")
    with pytest.raises(SettingsError, match="AWS_ENDPOINT_URL names '127.0.0.1:9000' with credentials") as caught:
        s3_endpoint()
    assert SECRET not in str(caught.value)

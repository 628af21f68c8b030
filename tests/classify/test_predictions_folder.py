"""What a run is, by its id, and the settings that make no sense."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from carray.classify.predictions_folder import (
    OPTIONAL_COLUMNS,
    PREDICTION_SCHEMA,
    VERSION,
    ClassifySettings,
    as_version,
    prediction_schema,
    run_id_of,
)
from carray.core.errors import SettingsError
from carray.core.settings import parse_settings
from carray.core.tables import hashes_as_int64, table_from_rows, write_table
from carray.images.pixels import PixelSettings
from carray.testing.predictions import row

RUN = {
    "bundle_id": "b1",
    "pixels": PixelSettings(),
    "runtime": "fp32",
    "columns": PREDICTION_SCHEMA.names,
    "source": {"uri": "s3://bucket/cars", "split": None, "all_files": False},
}


def run_id(**changes):
    values = {**RUN, **changes}
    return run_id_of(values.pop("bundle_id"), **values)


@pytest.mark.parametrize(
    "change",
    [
        {"bundle_id": "b2"},
        {"pixels": PixelSettings(aspect="pad")},
        {"runtime": "int8"},
        {"columns": [*PREDICTION_SCHEMA.names, "embedding"]},
        {"source": {"uri": "s3://bucket/cars", "split": "test", "all_files": False}},
    ],
)
def test_whatever_changes_rows_changes_the_run(change):
    assert run_id() == run_id()
    assert run_id(**change) != run_id()


def test_settings_that_make_no_sense_are_all_named():
    with pytest.raises(SettingsError) as caught:
        parse_settings(ClassifySettings, {"workers": 0, "fetch_concurrency": 65, "split": "all", "runtme": "fp32"})
    assert len(caught.value.problems) == 4
    with pytest.raises(SettingsError, match="shard_images_first is 64, above shard_images_max 10; lower it"):
        parse_settings(ClassifySettings, {"shard_images_max": 10})


def test_a_run_of_version_1_keeps_its_types(tmp_path: Path) -> None:
    """Engines refuse a folder whose files differ in types."""
    table = table_from_rows([row("a", phash=-5, embedding=[0.5])], prediction_schema(["embedding"]))
    earlier = as_version(table, 1)
    assert earlier.schema.field("phash").type == pa.uint64()
    assert earlier.schema.field("embedding").type.value_type == pa.float16()
    assert hashes_as_int64(earlier)["phash"].to_pylist() == [-5]
    write_table(earlier, str(tmp_path / "a.parquet"), kind="predictions", version=1)
    assert pd.read_parquet(tmp_path / "a.parquet")["phash"].tolist() == [2**64 - 5]
    assert as_version(table, VERSION) is table


def test_every_type_is_one_that_other_engines_have() -> None:
    schema = prediction_schema(list(OPTIONAL_COLUMNS))
    kinds = [getattr(field.type, "value_type", field.type) for field in schema]
    assert not any(pa.types.is_unsigned_integer(kind) or pa.types.is_float16(kind) for kind in kinds)

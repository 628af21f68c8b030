"""What a run is, by its id, and the settings that make no sense."""

from __future__ import annotations

import pytest

from carray.classify.predictions_folder import PREDICTION_SCHEMA, ClassifySettings, run_id_of
from carray.core.errors import SettingsError
from carray.core.settings import parse_settings
from carray.images.pixels import PixelSettings

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

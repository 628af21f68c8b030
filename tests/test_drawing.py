"""The generated images: deterministic, distinct, well-formed."""

from __future__ import annotations

import numpy as np
import pytest

from carray.core.errors import SettingsError
from carray.images.vehicles import parse_vehicle
from carray.manifest.prepare import prepare
from carray.testing.drawing import DEMO_CLASSES, draw_dataset, draw_image


@pytest.mark.parametrize("label", DEMO_CLASSES)
def test_image_depends_on_label_and_generator_only(label):
    first = draw_image(label, np.random.default_rng(5))
    assert np.array_equal(first, draw_image(label, np.random.default_rng(5)))
    assert not np.array_equal(first, draw_image(label, np.random.default_rng(6)))
    height, width, channels = first.shape
    assert first.dtype == np.uint8
    assert (150 <= height <= 190, 220 <= width <= 300, channels) == (True, True, 3)


def test_class_names_are_vehicles_of_several_makes_and_bodies():
    vehicles = [parse_vehicle(label) for label in DEMO_CLASSES]
    assert {vehicle.body for vehicle in vehicles} == {"Sedan", "Hatchback", "SUV", "Pickup", "Van", "Convertible"}
    assert len({vehicle.make for vehicle in vehicles}) >= 4
    assert all(vehicle.model and vehicle.year for vehicle in vehicles)


def test_dataset_of_more_images_begins_with_the_smaller_one(tmp_path):
    draw_dataset(tmp_path / "two", images_per_class=2)
    draw_dataset(tmp_path / "three", images_per_class=3)
    draw_dataset(tmp_path / "other", images_per_class=2, seed=1)
    images = {path.relative_to(tmp_path / "two"): path.read_bytes() for path in (tmp_path / "two").rglob("*.jpg")}
    assert len(images) == 2 * len(DEMO_CLASSES)
    assert all((tmp_path / "three" / name).read_bytes() == data for name, data in images.items())
    assert all((tmp_path / "other" / name).read_bytes() != data for name, data in images.items())


def test_drawn_images_are_no_near_duplicates(tmp_path):
    draw_dataset(tmp_path / "cars", images_per_class=8)
    report = prepare(str(tmp_path / "cars"), out=str(tmp_path / "manifest.parquet"))
    assert (report.ok, len(report.candidates.classes), report.near_groups) == (48, 6, 0)


def test_unknown_label_is_refused_with_the_allowed_ones():
    with pytest.raises(SettingsError, match="'Boat' cannot be drawn; allowed are Alder"):
        draw_image("Boat", np.random.default_rng(0))

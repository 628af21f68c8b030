"""Class names to make, model, body and year."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from carray.images.vehicles import Vehicle, parse_vehicle, vehicle_columns


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Acura RL Sedan 2012", ("Acura", "RL", "Sedan", 2012)),
        ("Ram C/V Cargo Van Minivan 2012", ("Ram", "C/V Cargo Van", "Minivan", 2012)),
        ("AM General Hummer SUV 2000", ("AM General", "Hummer", "SUV", 2000)),
        ("Aston Martin V8 Vantage Coupe 2012", ("Aston Martin", "V8 Vantage", "Coupe", 2012)),
        ("Land Rover LR2 SUV 2012", ("Land Rover", "LR2", "SUV", 2012)),
        ("Infiniti G Coupe IPL 2012", ("Infiniti", "G IPL", "Coupe", 2012)),
        (
            "Rolls-Royce Phantom Drophead Coupe Convertible 2012",
            ("Rolls-Royce", "Phantom Drophead Coupe", "Convertible", 2012),
        ),
        ("Dodge Ram Pickup 3500 Crew Cab 2010", ("Dodge", "Ram Pickup 3500", "Pickup", 2010)),
        ("Ford Ranger SuperCab 2011", ("Ford", "Ranger", "Pickup", 2011)),
        ("Ford E-Series Wagon Van 2012", ("Ford", "E-Series Wagon", "Van", 2012)),
        ("Chevrolet HHR SS 2010", ("Chevrolet", "HHR SS", None, 2010)),
        ("Audi 100 Sedan 1994", ("Audi", "100", "Sedan", 1994)),
        ("smart fortwo Convertible 2012", ("smart", "fortwo", "Convertible", 2012)),
        ("Birch Hauler Pickup 2007", ("Birch", "Hauler", "Pickup", 2007)),
        ("  Acura   RL  sedan 2012 ", ("Acura", "RL", "Sedan", 2012)),
    ],
)
def test_names_of_the_grammar(name, expected):
    assert parse_vehicle(name) == Vehicle(*expected)


@pytest.mark.parametrize(
    "name",
    [
        *("", "cat", "golden retriever", "2012", "Acura 2012", "Land Rover 2012", "Ford Sedan 2012", "Acura RL Sedan"),
        *("Acura RL Sedan 1899", "Acura RL Sedan 2101", "Acura RL Sedan 12012", "Acura RL 2012-13"),
        "Acura RL Sedan \u0662\u0660\u0661\u0662",  # Arabic digits
    ],
)
def test_anything_else_is_null_and_never_a_guess(name):
    assert parse_vehicle(name) == Vehicle(None, None, None, None)


def test_columns_keep_order_and_take_nulls():
    columns = vehicle_columns(["Acura RL Sedan 2012", None, "cat", np.nan, "Geo Metro Convertible 1993"])
    assert columns == {
        "make": ["Acura", None, None, None, "Geo"],
        "model": ["RL", None, None, None, "Metro"],
        "body": ["Sedan", None, None, None, "Convertible"],
        "year": [2012, None, None, None, 1993],
    }
    assert vehicle_columns([]) == {"make": [], "model": [], "body": [], "year": []}


def test_all_names_of_stanford_cars(cars):
    from scipy.io import loadmat

    names = [str(name) for name in loadmat(cars / "devkit" / "cars_meta.mat", squeeze_me=True)["class_names"]]
    vehicles = [parse_vehicle(name) for name in names]
    assert len(names) == 196
    assert len({vehicle.make for vehicle in vehicles}) == 49
    assert len({(vehicle.make, vehicle.model) for vehicle in vehicles}) == 175
    years = Counter(vehicle.year for vehicle in vehicles)
    assert (len(years), years[2012]) == (16, 117)
    bodies = Counter(vehicle.body for vehicle in vehicles)
    assert (bodies[None], bodies["Pickup"], bodies["Sedan"]) == (14, 18, 46)
    assert None not in {vehicle.make for vehicle in vehicles} | {vehicle.model for vehicle in vehicles}

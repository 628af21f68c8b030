"""What is said of a classification beforehand: by its own code, as ranges, and within what then happens."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from carray.classify.ledger import RunRecord
from carray.classify.predictions_folder import ClassifySettings, PlannedImage
from carray.core.errors import BundleError, SettingsError
from carray.core.store.files import write_bytes
from carray.preflight import classify_probe
from carray.preflight import estimate_classify as classify
from carray.preflight.estimate_classify import (
    S3_PRICES,
    Probe,
    count_requests,
    estimate_classify,
    longest_share,
    shard_sizes,
)
from carray.preflight.estimates import Machines, Pair, Range
from carray.testing.fault_proxy import start_proxy


def estimate(bundle: str, source: object, **wanted: object):
    given = {"settings": ClassifySettings(), "machines": Machines(2, 4, hour_price=0.5), "probe": Probe(workers=1)}
    return estimate_classify(bundle, str(source), **(given | wanted))


def test_an_estimate_is_of_ranges_and_of_this_source(small_bundle, image_folder):
    (image_folder / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    (image_folder / "notes.txt").write_text("no image")
    found = estimate(small_bundle, image_folder)
    said = json.loads(json.dumps(found.as_json()))
    assert (said["images"], said["shards"], said["listed_completely"]) == (13, 1, True)
    assert said["probe_error_codes"] == {"truncated": 1}
    assert 0 < said["images_per_second_per_core"][0] <= said["images_per_second_per_core"][1]
    assert said["list_requests"] == said["get_requests"] == said["put_requests"] == [0, 0]
    for name in ("seconds", "machine_hours", "core_hours", "machine_money"):
        low, high = said[name]
        assert 0 < low < high
    assert said["core_hours"][1] == pytest.approx(said["machine_hours"][1] * 4, rel=0.01)
    assert said["machine_money"][1] == pytest.approx(said["machine_hours"][1] * 0.5, rel=0.01)
    text = found.as_text()
    assert "13 images" in text
    low, high, decoding = map(float, re.search(r"takes ([\d.]+) to ([\d.]+) ms .* decoding ([\d.]+)\.", text).groups())
    assert 0 < low <= high and 0 < decoding < high
    assert "1 of them failed (1 truncated)" in text
    assert "Only 1 of 8 cores have work" in text


def test_more_images_on_as_many_machines_take_longer(small_bundle, image_folder, monkeypatch):
    measured = []

    def measure_once(*given, **named):
        measured.append(measured[0] if measured else classify_probe.measure_scoring(*given, **named))
        return measured[-1]

    monkeypatch.setattr(classify, "measure_scoring", measure_once)  # two measurements here may differ tenfold
    few = estimate(small_bundle, image_folder)
    million = Probe(workers=1, total_images=1_000_000)
    many = estimate(small_bundle, image_folder, probe=million)
    assert many["images"] == 1_000_000
    assert many["shards"] > 400
    assert many["seconds"].low > few["seconds"].high
    more = estimate(small_bundle, image_folder, machines=Machines(20, 4), probe=million)
    assert more["seconds"].high < many["seconds"].high / 2


def test_images_on_s3_are_counted_in_requests_and_money(s3, small_bundle, make_image):
    for i in range(40):
        write_bytes(f"{s3}/photos/{i:02d}.jpg", make_image(i))
    found = estimate(small_bundle, f"{s3}/photos", prices=S3_PRICES | {"get": 10.0})
    assert 40 < found["get_requests"].low < found["get_requests"].high
    assert found["list_requests"].low >= 1
    assert found["request_money"].low >= 0.4
    local = estimate(small_bundle, f"{s3}/photos", out="/results")
    assert local["get_requests"].low == 40
    assert local["put_requests"].low == 0
    assert "not priced" in estimate(small_bundle, f"{s3}/photos", machines=Machines(2, 4)).as_text()


def test_a_listing_that_is_stopped_says_at_least(small_bundle, tmp_path, make_image, monkeypatch):
    for i in range(200):
        (tmp_path / f"{i:03d}.jpg").write_bytes(make_image(i % 5))
    settings = ClassifySettings(shard_images_first=16, shard_images_max=16)
    monkeypatch.setattr(classify_probe, "open_plan", stopped_plan(classify_probe.open_plan))
    found = estimate(small_bundle, tmp_path, settings=settings, probe=Probe(workers=1, listing_seconds=0.0))
    assert not found["listed_completely"]
    text = found.as_text()
    assert f"at least {found['images']:,} images, listed so far, " in text
    assert "--total-images" in text


def test_a_count_that_is_known_ends_the_listing_early(monkeypatch, small_bundle, image_folder):
    asked = []
    real = classify.draw_images
    monkeypatch.setattr(classify, "draw_images", lambda *a, **k: (asked.append(k["seconds"]), real(*a, **k))[1])
    assert estimate(small_bundle, image_folder, probe=Probe(workers=1, total_images=500))["images"] == 500
    estimate(small_bundle, image_folder)
    assert asked == [10.0, 120.0]


def stopped_plan(open_plan):
    """Let a plan be as one whose listing goes on for long: some shards, and no end."""
    from contextlib import contextmanager

    @contextmanager
    def opened(*arguments, **named):
        with open_plan(*arguments, **named) as plan:
            plan.totals()
            plan._totals = None
            yield plan

    return opened


def test_a_bundle_that_is_damaged_is_its_own_error(small_bundle, image_folder, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(small_bundle, broken)
    (broken / "model.onnx").write_bytes(b"no network")
    with pytest.raises(BundleError, match="model.onnx"):
        estimate(str(broken), image_folder)


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        ({"device": "cuda"}, "an estimate measures on cpu"),
        ({"since": "before"}, "since is set, but only a whole run can be estimated"),
        ({"retry_failed": True}, "retry_failed is set, but only a whole run can be estimated"),
    ],
)
def test_what_is_not_measured_is_refused(small_bundle, image_folder, wanted, complaint):
    with pytest.raises(SettingsError, match=complaint):
        estimate(small_bundle, image_folder, settings=ClassifySettings(**wanted))


def measured(processor: float, clock: float):
    return classify_probe.Measured(
        100, Pair(processor, clock), 0.5, size_bytes=5_000, error_codes=Counter({"empty": 1}), open_seconds=1.0
    )


def test_the_range_goes_from_the_processors_time_to_the_slowest_clocks():
    cost = classify_probe.cost_of([measured(0.01, 0.02), measured(0.012, 0.025)])
    assert cost.seconds == Range(pytest.approx(0.011), 0.025)
    assert cost.error_codes == {"empty": 2}
    assert (cost.bytes_per_image, cost.decode_seconds) == (50, 0.005)


def test_processes_take_disjoint_parts_and_all_where_images_are_few(monkeypatch):
    taken = []

    def together(work, arguments):
        taken.extend([list(one[-1]) for one in arguments])
        return [measured(0.01, 0.01) for _ in arguments]

    class Settings:
        def model_dump(self):
            return {}

    monkeypatch.setattr(classify_probe, "run_in_parallel", together)
    classify_probe.measure_scoring("b", Settings(), Settings(), list(range(100)), workers=2)
    assert Counter(taken[0]) + Counter(taken[1]) == Counter(range(100))
    taken.clear()
    classify_probe.measure_scoring("b", Settings(), Settings(), list(range(40)), workers=2)
    assert sorted(taken[0]) == sorted(taken[1]) == list(range(40))


COST = classify_probe.Cost(Range(0.001, 0.002), 0.001, 1.0, 100, 1e5, {}, 0.0)


def test_many_workers_beside_s3_are_throttled():
    run = RunRecord.model_construct(source="s3://b/photos", runtime="int8")
    sample = classify_probe.Sample(10_000_000, True, 10_000_000, [PlannedImage("s3://b/photos/a.jpg")])
    machines = Machines(100, 16)
    found = classify._scale(run, ClassifySettings(), sample, COST, machines, S3_PRICES, out=None, total=None)
    assert found["seconds"].high > 10_000_000 / 5_500
    assert "SlowDown" in found.as_text()


def test_paths_are_as_the_job_takes_them(small_bundle, image_folder, monkeypatch):
    monkeypatch.chdir(image_folder.parent)
    assert estimate(small_bundle, "images/")["source"] == str(Path(image_folder))


@pytest.mark.parametrize("images", [1, 64, 65, 5_701, 1_000_000])
def test_shards_hold_every_image_and_grow(images):
    sizes = list(shard_sizes(images, ClassifySettings()))
    assert sum(sizes) == images
    assert sizes[0] == min(64, images)
    assert max(sizes) <= 10_000


def test_a_hundred_million_images_are_about_ten_thousand_shards():
    assert 10_000 < len(list(shard_sizes(100_000_000, ClassifySettings()))) < 11_000


def test_shares_are_even_where_shards_are_many_and_one_shard_where_workers_are():
    busiest, shards = longest_share(1_000_000, ClassifySettings(), 10)
    assert 100_000 <= busiest < 110_000
    busiest, _ = longest_share(1_000_000, ClassifySettings(), 100_000)
    assert busiest == max(shard_sizes(1_000_000, ClassifySettings()))
    assert longest_share(100, ClassifySettings(), 1) == (100, 2)
    assert shards == len(list(shard_sizes(1_000_000, ClassifySettings())))


def test_prices_are_for_a_thousand_requests():
    run = RunRecord.model_construct(source="s3://b/photos", runtime="int8")
    sample = classify_probe.Sample(1_000_000, True, 1_000_000, [PlannedImage("s3://b/photos/a.jpg")])
    prices = {"list": 0.0, "get": 2.0, "put": 0.0}
    found = classify._scale(run, ClassifySettings(), sample, COST, Machines(2, 4), prices, out="/out", total=None)
    assert found["request_money"].low == pytest.approx(2_000)


def test_what_readme_says_of_a_hundred_million_images():
    settings = ClassifySettings()
    found = count_requests(
        100_000_000, 100_000_000, settings, workers=160, listed=True, out_on_s3=True, images_on_s3=True
    )
    assert 100_000 < found["list"].low < found["list"].high < 125_000
    assert 100_030_000 < found["get"].low < found["get"].high < 102_000_000
    assert 200_000 < found["put"].low < 250_000


def test_local_files_cost_no_request():
    found = count_requests(100, 100, ClassifySettings(), workers=2, listed=False, out_on_s3=False, images_on_s3=False)
    assert set(found.values()) == {Range(0, 0)}


def test_a_real_jobs_requests_lie_within(s3, s3_server, small_bundle, make_image, monkeypatch):
    """Sixty images in shards of eight, from bucket to bucket, through a proxy that counts."""
    from carray.classify.job import classify

    for i in range(60):
        write_bytes(f"{s3}/photos/{i:03d}.jpg", make_image(i % 7))
    bucket = s3.removeprefix("s3://")
    seen: Counter[str] = Counter()
    settings = ClassifySettings(shard_images_first=8, shard_images_max=8, workers=1)
    with start_proxy(s3_server.endpoint) as proxy:
        strike = proxy.rules_for

        def count(method: str, path: str):
            is_list = method == "GET" and urlsplit(path).path.strip("/") == bucket
            seen["list" if is_list else {"HEAD": "get"}.get(method, method.lower())] += 1
            return strike(method, path)

        monkeypatch.setattr(proxy, "rules_for", count)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        outcome = classify(small_bundle, f"{s3}/photos", out=f"{s3}/out", settings=settings)
    assert outcome["rows"] == 60
    counted = count_requests(60, 60, settings, workers=1, listed=True, out_on_s3=True, images_on_s3=True)
    for kind, due in counted.items():
        assert due.low <= seen[kind] <= due.high

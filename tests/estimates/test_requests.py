"""Shards and requests of a job, counted beforehand and, on a real store, as they come."""

from __future__ import annotations

from collections import Counter
from urllib.parse import urlsplit

import pytest
from fault_proxy import start_proxy

from carray.core.storage import write_bytes
from carray.estimates.requests import Prices, Requests, count_requests, longest_share, shard_sizes
from carray.predictions.format import ClassifySettings


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


def test_prices_are_for_a_thousand():
    assert Requests(lists=100_000, gets=100_000_000, puts=200_000).money(Prices()) == pytest.approx(0.5 + 40 + 1)
    assert Requests(1_000, 0, 0).money(Prices(list_requests=2.0)) == 2.0


def test_what_readme_says_of_a_hundred_million_images():
    settings = ClassifySettings()
    least, most = count_requests(
        100_000_000, 100_000_000, settings, workers=160, listed=True, out_on_s3=True, images_on_s3=True
    )
    assert 100_000 < least.lists < most.lists < 125_000
    assert 100_600_000 < least.gets < most.gets < 103_000_000
    assert 200_000 < least.puts < 250_000


def test_local_files_cost_no_request():
    nothing = Requests(0, 0, 0)
    assert count_requests(
        100, 100, ClassifySettings(), workers=2, listed=False, out_on_s3=False, images_on_s3=False
    ) == (nothing, nothing)


def test_a_real_jobs_requests_lie_within(ray_cluster, s3, s3_server, small_bundle, make_image, monkeypatch):
    """Sixty images in shards of eight, from bucket to bucket, through a proxy that counts."""
    from carray.predictions.on_ray import classify

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
    least, most = count_requests(60, 60, settings, workers=1, listed=True, out_on_s3=True, images_on_s3=True)
    assert least.lists <= seen["list"] <= most.lists
    assert least.gets <= seen["get"] <= most.gets
    assert least.puts <= seen["put"] <= most.puts

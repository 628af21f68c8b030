"""predictions: a folder of Parquet files, one row an image of a bucket, whatever became of it.

    OUT/part-000000.parquet ...   the rows: `pd.read_parquet(OUT)` reads them all, and nothing else
    OUT/_carray/run.json          what the run is: bundle, source, runtime (written before the first shard)
    OUT/_carray/source.json       which state of a table or an inventory is listed
    OUT/_carray/shards/*.arrow    the images of each shard, and what part of the source it covers; never changed
    OUT/_carray/listing.json      what the listing found, written last: it is complete exactly when this exists
    OUT/_carray/ledger/*.json     one entry a finished shard, written after its rows
    OUT/_carray/attempts/*.json   what a worker has in hand right now; left behind only by one that was killed
    OUT/_carray/driver.json       which driver works here, and when it last said so
    OUT/_carray/done.json         the counts, written last: the run is complete exactly when this exists

1. listing   folder, prefix, inventory or table -> a source (sources, tables, inventory), which gives pieces of keys
2. plan      pieces -> shards, fixed once they are written, while the listing runs (shards)
3. reading   keys -> originals in bounded memory -> pixels
4. build     one shard of keys -> one Parquet file, in a worker without Ray and torch (rows, since)
5. ledger    what is done, what is missing, whether rows out are images in (failures: whether too many failed)
6. on_ray    `classify`, the whole job: one driver (core.store.lease), rounds of shards over Ray Data's workers
7. compact   many files -> few, in another folder
8. format    the rows' schema, the job's settings, the names of its files
"""

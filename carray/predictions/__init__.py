"""predictions: a folder of Parquet files, one row an image of a bucket, whatever became of it.

    OUT/part-000000.parquet ...   the rows: `pd.read_parquet(OUT)` reads them all, and nothing else
    OUT/_carray/run.json          what the run is: bundle, source, runtime (written before the first shard)
    OUT/_carray/source.json       which state of a table or an inventory is listed
    OUT/_carray/shards/*.arrow    the images of each shard, and what part of the source it covers; never changed
    OUT/_carray/listing.json      what the listing found, written last: it is complete exactly when this exists
    OUT/_carray/ledger/*.json     one entry a finished shard, written after its rows
    OUT/_carray/attempts/*.json   what a worker has in hand right now; left behind only by one that was killed
    OUT/_carray/done.json         the counts, written last: the run is complete exactly when this exists

1. listing   folder, prefix, inventory or table -> a source (sources, tables, inventory), which gives pieces of keys
2. plan      pieces -> shards, fixed once they are written, while the listing runs (shards)
3. build     one shard of keys -> fetch, decode, score -> one Parquet file (in a worker; imports no Ray, no torch)
4. ledger    what is done, what is missing, whether rows out are images in
5. on_ray    the shards over Ray Data's workers, and `classify`, the whole job
6. format    the rows' schema, the job's settings, the names of its files
"""

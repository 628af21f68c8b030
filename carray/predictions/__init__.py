"""predictions: a folder of Parquet files, one row an image of a bucket, whatever became of it.

    OUT/part-000000.parquet ...   the rows: `pd.read_parquet(OUT)` reads them all, and nothing else
    OUT/_carray/run.json          what the run is: bundle, source, runtime, counts (written after the shards' keys)
    OUT/_carray/shards/*.arrow    the keys of each shard, fixed by the first listing
    OUT/_carray/ledger/*.json     one entry a finished shard, written after its rows
    OUT/_carray/attempts/*.json   what a worker has in hand right now; left behind only by one that was killed
    OUT/_carray/done.json         the counts, written last: the run is complete exactly when this exists

1. listing   folder, prefix or table -> images to score
2. plan      images to score -> shards of keys, fixed once
3. build     one shard of keys -> fetch, decode, score -> one Parquet file (in a worker; imports no Ray, no torch)
4. ledger    what is done, what is missing, whether rows out are images in
5. on_ray    the shards over Ray Data's workers, and `classify`, the whole job
6. format    the rows' schema, the job's settings, the names of its files
"""

"""predictions: a folder of Parquet files, one row an image of a bucket, whatever became of it.

    OUT/part-000000.parquet ...   the rows: `pd.read_parquet(OUT)` reads them all, and nothing else
    OUT/_carray/run.json          what the run is: bundle, source, runtime (written before the first shard)
    OUT/_carray/source.json       which state of a table or an inventory is listed
    OUT/_carray/shards/*.arrow    the images of each shard, and what part of the source it covers; never changed
    OUT/_carray/listing.json      what the listing found, written last: it is complete exactly when this exists
    OUT/_carray/ledger/*.json     one entry a finished shard and one a retry, created after its rows
    OUT/_carray/attempts/*.json   what a worker has in hand right now; left behind only by one that was killed
    OUT/_carray/driver.json       which driver works here, and when it last said so
    OUT/_carray/done.json         the counts, written last: the run is complete exactly when this exists

sources            folder, prefix, inventory or table -> pieces of keys
plan, shards       pieces -> shards, fixed once they are written, while the listing runs
read_images        keys -> originals in bounded memory -> pixels
score_shard        one shard of keys -> one Parquet file, in a worker without Ray and torch (since: what is new)
ledger, attempts   what is done, whether rows out are images in; what a worker that died had in hand
job                `classify`, the whole job: one driver, rounds of shards over an engine's workers
engine             runs the workers: local in processes of this machine, worker_on_ray as actors of Ray Data
compact            many files -> few, in another folder
predictions_folder the rows' schema, the job's settings, the names of its files
"""

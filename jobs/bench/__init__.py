"""The benchmarks; each is run as a module from the clone, has --help, and appends rows to results/*.csv.

python -m jobs.bench.cars              the whole flow on Stanford Cars
python -m jobs.bench.search            the search: speed, early stopping, rung 0, accuracy in an hour
python -m jobs.bench.search.gpu        the search on a GPU
python -m jobs.bench.classify          classification beside other tools, its ceiling, its cost as it grows
python -m jobs.bench.classify.decode   the check for damaged images
python -m jobs.bench.classify.runtimes  bundles' runtimes on one core; prints a table
python -m jobs.bench.classify.listing  listing a bucket
python -m jobs.bench.evaluate          corrupted images, and images without cars
python -m jobs.bench.query             questions over millions of rows
python -m jobs.bench.scale             what a driver can do, and a simulation of many machines
python -m jobs.bench.estimate          estimates beside what then happened
"""

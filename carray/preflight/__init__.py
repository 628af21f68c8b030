"""preflight: is everything ready for a job (`carray doctor`), and what will it take (`carray estimate`).

doctor             all checks side by side, within a bounded time
findings           the result of a check: ok, warn or fail, what was seen, what to do
machine            cores, memory, disks, limits and installed versions, within a container's limits
storage            folders and buckets: list, read and write with the present rights; the clock
isolated           checks that import what may be broken, in a process of their own
cluster_on_ray     the Ray cluster of RAY_ADDRESS, and the same checks on each of its machines
estimate_classify  images, shards and requests -> hours, requests and money of a classification
classify_probe     what one image costs a core, measured by the job's own code
estimate_tune      images and epochs -> hours and money of a search
tune_probe         what an epoch of each network costs, measured by a trial's own code
estimates          what both share: ranges, their table and JSON, measuring in several processes at once
"""

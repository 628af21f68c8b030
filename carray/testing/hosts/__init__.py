"""A Ray cluster of several hosts on one machine: a head, two workers and an object store, in network namespaces.

`python -m carray.testing.hosts up` starts one by hand (cluster/README.md). Needs Linux, root, iproute2 and util-linux.
"""

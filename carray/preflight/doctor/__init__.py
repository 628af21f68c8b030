"""doctor: what this machine has for carray's jobs, and what to do about what it lacks; one line a check.

1. findings        one line: ok, warn or fail, what was seen, what to do
2. machine         cores, memory, disks and limits, as a container leaves them
3. software        versions against pyproject's, and imports in processes of their own (isolated)
4. storage         places: listed, read, written with the rights at hand; the clock beside the store's
5. cluster_on_ray  the Ray that RAY_ADDRESS names, and the same checks on each of its machines
6. examine         all of it side by side, within a bounded time
"""

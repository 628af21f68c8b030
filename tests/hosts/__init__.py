"""hosts: a cluster of four hosts on one machine, for the tests of what only several hosts can show.

1. network        network namespaces at one switch, whose cables can be pulled and slowed
2. first_process  what a host starts with: its own processes, name, /tmp, home and shared memory
3. machine        one host: switched on, given commands, killed
4. cluster        a Ray head and two workers with a token, and an object store
5. submission     a job as its user submits it, stops it and submits it again

`python tests/hosts up` brings one up by hand; cluster/README.md says how it is used. Needs Linux, root, Debian's
iproute2 and util-linux.
"""

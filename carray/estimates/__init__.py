"""estimates: what a job will take, before it is begun: a few hundred images are put through its own code, here.

1. ranges       from and to, never one figure; how they are laid out
2. together     the same work in as many processes as a job has, at once
3. sampling     a source -> how many images, and some of them
4. scoring      some images -> what one costs a core, by the worker's own code
5. requests     how many images -> shards, and requests to the store
6. classify     all of that -> hours, requests and money of a classification; classify_text lays it out
7. training     some images -> what an epoch of each network costs, by a trial's own code
8. stopping     made-up learning curves -> epochs and hours, by the search's own scheduler (rehearsal)
9. tune         all of that -> hours and money of a search; tune_text lays it out
"""

"""estimates: what a job will take, before it is begun: a few hundred images are put through its own code, here.

1. ranges           from and to, never one figure; how they are laid out
2. parallel         the same work in as many processes as a job has, at once
3. classify_probe   a source -> how many images, and what one of them costs a core, by the worker's own code
4. classify         that, by shards and requests -> hours, requests and money of a classification
5. tune_probe       some images -> what an epoch of each network costs, by a trial's own code
6. tune             that, times images and epochs -> hours and money of a search
"""

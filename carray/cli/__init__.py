"""commands: what `carray` can be told, one thin function a subcommand; `__main__` lists them.

1. data        images -> a manifest; and the demo, which draws its own
2. search      a manifest -> a run: search, one training, leaderboard, export
3. score       a bundle -> figures and predictions
4. stress      a bundle -> what corrupted pictures and images from outside do to it
5. questions   predictions -> answers; two runs -> what changed
6. pages       predictions -> a page to look at
7. before      a machine, a cluster -> what it lacks; a job -> what it will take
"""

"""tensors: a manifest's training images, decoded once a machine into one read-only block that every trial maps.

1. format   what a block is, where it lies, and how it is opened
2. build    manifest -> block, under a lock, so that many processes ask and one decodes
3. batches  block -> shuffled or ordered batches, and evaluation's view of them
"""

"""tensors: a manifest's training images, decoded once a machine (block), and the batches of them (batches)."""

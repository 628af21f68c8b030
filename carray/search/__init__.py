"""Searches over networks: one trial is one configuration, trained on the block that all trials share."""

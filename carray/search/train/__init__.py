"""Trains one network; needs no Ray."""

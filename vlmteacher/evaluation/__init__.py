"""Sweeps over the instances of a benchmark."""

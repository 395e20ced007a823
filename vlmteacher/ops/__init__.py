"""Operators on tensors. Each module has a reference in plain torch, an autograd function and dispatch to backends."""

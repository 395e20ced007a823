"""Operators on tensors. A module holds a reference in plain torch, its autograd and the dispatch to backends."""

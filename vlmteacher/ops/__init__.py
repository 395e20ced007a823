"""Operators on tensors. Each module holds a reference in plain torch, its autograd and the dispatch to fast backends."""

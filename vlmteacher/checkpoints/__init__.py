"""Pretrained weights: from the hub or a directory, checked before use."""

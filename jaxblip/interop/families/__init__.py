"""How each family of models stands in checkpoints: a `Layout` of its weights, and its config.

A `*_layout` is the whole of one kind of checkpoint; `*_entries` are parts that layouts are built
from, under any prefix.
"""

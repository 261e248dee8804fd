"""Implementations of the operators, one folder each, with the same file names in each.

`registry.py` decides which one runs. May import: `_native`, `packing`, `weights`, torch.
"""

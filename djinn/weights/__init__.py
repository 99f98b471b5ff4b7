"""What is streamed: a model without its weights, where each of their bytes is, and in which order passes read them.

Imports: codec, root. A name is resolved to a folder, opened as an index, and its tensors are grouped into units.
Read units.py first, then index.py.
"""

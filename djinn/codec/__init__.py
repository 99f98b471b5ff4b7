"""Lossless coding of bfloat16 weights: about 11 of their 16 bits, and back, bit for bit.

The lowest room: it imports torch, NumPy, Triton and the root's errors, and nothing else of djinn. Read
:mod:`djinn.codec.layout` first, then :mod:`djinn.codec.reference`, which every backend has to equal.
"""

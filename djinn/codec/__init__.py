"""Lossless coding of bfloat16 weights, about 11 bits each: NumPy on a CPU, Triton on a GPU, the same bytes from both.

Imports: the files at the package's root. A tensor goes encode -> blob -> decode; backends picks who does it.
Read layout.py first: the format, and why its bits lie in that order.
"""

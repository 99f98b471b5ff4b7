"""What the host's own processors compute where weights lie in its memory: products of them and few vectors.

Imports: root. A GPU that waits for such a product does not need the weights, and the link carries others meanwhile.
Read products.py first; products.cpp is the kernel, and threads.h hands its work out.
"""

"""What the host's own processors compute where weights lie in its memory: products of them and few vectors.

Imports: transport, planning and all below them. A GPU that waits for such a product does not need the weights, and the
link carries others meanwhile. Read products.py first, then ahead.py, which queues products for a GPU; products.cpp is
the kernel, threads.h hands its work out, and queue.h waits for the GPU.
"""

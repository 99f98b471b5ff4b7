"""How bytes move: from files and pinned host memory into the ring, as the plan says.

Imports: planning, weights, codec, root. A copier fills slots in every pass, from the arena or from disk.
Read copier.py first, the protocol; cpu.py and cuda.py are the engines that keep it.
"""

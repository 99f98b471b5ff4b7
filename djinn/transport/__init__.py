"""How bytes move: from files and pinned host memory into the ring, as the plan says.

Imports: planning, weights, codec, root. The reader fills the arena once; a copier fills slots in every pass.
Read copier.py first, the protocol; cpu.py and cuda.py are the engines that keep it.
"""

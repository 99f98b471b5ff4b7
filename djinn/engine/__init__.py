"""What makes a model stream: opened, planned, bound to its bytes, hooked, guarded, and all of that undone.

Imports: transport, planning, weights, codec, root. load -> opened -> assembly; then the streamer alone runs.
Read streamer.py first, then load.py.
"""

"""What is decided, before anything is allocated. Pure: no device, no file, no clock.

Imports: weights, codec, root. A request and units go in; a plan and its ring schedule come out.
Read ring.py first, then placement.py.
"""

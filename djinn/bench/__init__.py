"""What is measured: this machine, djinn and its peers, run by run, as records that are never rewritten.

Imports: profiles, engine and all below it. The harness asks a worker process for each run; a Run holds them.
Read records.py first, then harness.py.
"""

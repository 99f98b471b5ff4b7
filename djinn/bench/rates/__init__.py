"""Raw rates of this machine, with nothing of djinn's engine beside them: link, disk, compute.

Imports: as djinn.bench. Certifying measures all of them; bench.measure measures one beside each run.
Read link.py first.
"""

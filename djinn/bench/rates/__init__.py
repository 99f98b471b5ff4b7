"""Rates of this machine: raw ones of link, disk and compute, the host's, and what streaming costs beside copies.

Imports: as djinn.bench. Certifying measures all of them; bench.measure measures the link beside each run.
Read link.py first.
"""

"""Run language models larger than device memory by streaming their weights."""

"""Benchmarks: every figure beside its limit, measured in the same run, and beside a peer where there is one.

The machine is taken to be noisy: what is compared runs in turns within one process, a figure is the median of the
rounds, and the fastest and slowest are kept. See docs/performance.md for results and the meaning of each column.
"""

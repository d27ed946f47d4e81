"""What tstpool is measured with: servers to compare (peers/), a load generator (c/), a runner and its report.

``python -m benchmarks`` measures, ``python -m benchmarks --help`` says how. RESULTS.md holds the last figures that were
worth keeping, with the machine and the method. Read in this order: workloads.py, peers/__init__.py, measure.py,
results.py.
"""

"""What tstpool is measured with: servers to compare (peers/), load generators (c/, drivers.py), a runner, its report.

``python -m benchmarks`` measures, ``python -m benchmarks --help`` says how; ``python -m benchmarks.check`` tells
whether tstpool has become slower. RESULTS.md holds the last figures that were worth keeping, with the machine and the
method. Read in this order: workloads.py, peers/__init__.py, measure.py, results.py, floors.py.
"""

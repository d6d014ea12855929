"""What jobs/benchmark.py measures and how.

cases.py says what a case is; ratios.py lists what is held against what. A case is computed by its subject (subjects.py:
ours, plain transformers, PEFT) on its rows (rows.py) in a loop (loops.py, trials.py), behind a meter (meter.py), in a
process of its own (child.py). turns.py lets the processes of a group take turns; results.py makes numbers of it,
report.py shows them. scaling.py measures workers and whole runs, fitting.py the rates behind a dry run's estimate.
"""

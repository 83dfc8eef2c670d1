"""Benchmarks: what is measured (cases), how (contest), the figures, their tables and plots.

python -m bench                                   figures, a table and a plot in runs/bench
python -m bench.figures --group conv1x1 conv3x3   some of them
pytest bench/bench_ops.py                         every kernel, in pytest-benchmark's tables
python -m bench.bench_models                      whole networks
python -m bench.bench_training                    training steps of a whole network
"""

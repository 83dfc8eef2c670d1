"""The experiment: sparse networks of searched cells against others, at equal nonzeros.

python -m bench.experiment list       every row: done, in progress, missing
python -m bench.experiment run        what is missing, each row resumable
python -m bench.experiment latency    times of the trained networks; wants a quiet machine
python -m bench.experiment test       the test set, once per trained network
python -m bench.experiment tables     docs/results.md from the files of results/

docs/results.md has the protocol and the tables.
"""

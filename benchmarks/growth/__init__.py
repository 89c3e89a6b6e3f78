"""Growth against training from scratch, measured: a plan names the runs, one command does those that are missing.

python -m benchmarks.growth data --out data/growth train.jsonl --validation V.jsonl --test T.jsonl
python -m benchmarks.growth run benchmarks/growth/plans/tiny.yaml --data data/growth --out growth --workers 2
python -m benchmarks.growth figures growth/results.jsonl --out figures
python -m benchmarks.growth table growth/results.jsonl [--groups p3-10 p3-20] [--markdown]
"""

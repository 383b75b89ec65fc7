"""What `benchmarks/gpu.py` runs in processes of their own."""

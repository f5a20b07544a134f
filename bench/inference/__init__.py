"""What `bench/infer.py` is made of."""

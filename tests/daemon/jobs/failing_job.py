"""A job that ends before its worker could dial."""

import sys

for line in range(30):
    print(f"line {line}", flush=True)
sys.exit("no module named cuda_of_our_dreams")

"""Lets bench_kernels.py import its neighbours as the scripts beside it do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

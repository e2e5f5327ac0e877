"""Ops of mmfast on plain tensors: Triton kernels, C++ routines, and a plain-torch reference beside each."""

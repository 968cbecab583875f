"""Tensors, modules and autograd on workers, by handles."""

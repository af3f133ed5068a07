"""Capture the activations of a neural network, and draw them again without it."""

__version__ = "0.1.0"

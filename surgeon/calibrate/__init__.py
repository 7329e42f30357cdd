"""Calibration: what a model computes on a few texts, gathered for passes."""

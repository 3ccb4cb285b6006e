"""Sweeps over recipes: points, controls, search, choice and report."""

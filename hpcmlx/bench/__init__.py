"""Measurements behind the README's numbers."""

"""Helpers shared by the data, models and systems."""

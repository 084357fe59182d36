"""Learned parts: what a method learns beside what it distils."""

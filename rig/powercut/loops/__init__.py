"""Loops with real guests."""

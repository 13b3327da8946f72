"""Planted defects, and which way of looking finds each."""

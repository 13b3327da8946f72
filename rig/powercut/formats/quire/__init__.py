"""Quire under the crash search: histories of a set, and the judge that opens the real thing on every crash state."""

"""Measure what compression saves: seconds, bytes, tokens."""

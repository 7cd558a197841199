"""Distances between image sets, in float64, defined on features of a named extractor."""

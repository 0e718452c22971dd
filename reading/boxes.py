"""Boxes that a model writes, mapped to pixels of the original page and drawn over it."""

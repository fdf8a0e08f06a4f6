"""Smaller or secret forms of a block's bytes, per tier."""

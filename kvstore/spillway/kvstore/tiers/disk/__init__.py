"""Blocks in segment files on a disk."""

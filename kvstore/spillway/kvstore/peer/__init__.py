"""Blocks in other agents' memory and disks: a block server, and a tier that loads from such servers."""

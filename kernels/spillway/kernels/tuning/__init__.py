"""Tile sizes per GPU: readable tables, how they are looked up, and the command that finds better ones."""

from spillway.kernels.tuning.tables import DecodeTile, PrefillTile, decode_tile, prefill_tile

__all__ = ["DecodeTile", "PrefillTile", "decode_tile", "prefill_tile"]

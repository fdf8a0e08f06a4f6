"""What the ops mean, written the obvious way in float64: the yardstick of every test, never a path that serves.

Nothing here changes its arguments: what an op does in place is returned.
"""

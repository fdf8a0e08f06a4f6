"""Places that hold blocks."""

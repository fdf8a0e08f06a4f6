"""In what order blocks leave a tier."""

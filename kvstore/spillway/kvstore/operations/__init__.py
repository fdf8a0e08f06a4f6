"""What people do with a live store: look into the index and into disk directories, verify, drop, warm."""

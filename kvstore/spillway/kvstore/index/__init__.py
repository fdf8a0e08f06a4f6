"""Where blocks are: which tier of which node."""

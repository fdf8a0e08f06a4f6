"""One pure function a kind: what was observed to what should be."""

"""Kernel bodies for LLVM; imported only when one has to be compiled."""

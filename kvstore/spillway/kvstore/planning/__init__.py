"""What the store knows of the future: the job's lines in order, and the blocks that each begins with."""

"""The batch service: many jobs of many clients over the one-process Job, with lines leased to agents."""

"""The operator's decisions: observed state in, desired objects and status out."""

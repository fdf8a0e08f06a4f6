"""Stores of several processes over one Redis, worked hard while faults strike, then judged."""

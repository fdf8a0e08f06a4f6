"""The agent: leases lines from a gateway, runs them on this machine's engine, and answers for them."""

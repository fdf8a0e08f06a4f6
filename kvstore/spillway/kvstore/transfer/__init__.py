"""Moving blocks between the caller and the tiers below host memory, on threads, with deadlines."""

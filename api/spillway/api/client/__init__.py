"""Speaking to a gateway over gRPC: where it is, who asks, and what its refusals mean."""

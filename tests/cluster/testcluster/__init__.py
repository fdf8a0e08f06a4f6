"""Real Kubernetes on one machine, for tests: nothing here is pretended but the GPUs.

`control_plane.ControlPlane` is etcd, the API server, the controller manager and the scheduler, ready in seconds.
"""

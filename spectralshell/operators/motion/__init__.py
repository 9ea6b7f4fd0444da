"""dM/dt: directions, gates, the rate of J, the derivative, and the kernel in motion."""

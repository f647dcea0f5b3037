"""The rng worker: random bytes of the host for a guest."""

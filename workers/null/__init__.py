"""The null back end: what answers a guest where there is no device."""

"""Sandboxes: policies, stages, and what a host has of them."""

OFF_VARIABLE = "SV_SANDBOX_OFF"  # tells a nursery which stages were given up: "landlock,net"

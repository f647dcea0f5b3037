"""The balloon worker: memory that the guest doesn't use goes back to the host."""

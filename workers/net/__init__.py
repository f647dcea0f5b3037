"""The net worker: one NIC, frames between its virtqueues and a tap."""

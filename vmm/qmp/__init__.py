"""QMP: the control socket of one VM. `server` listens, the rest loads with the first client."""

"""`stratoctl`: a client over QMP for people. It knows nothing of the VMM but its QMP and pages."""

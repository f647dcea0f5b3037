"""The console worker: terminals and serial ports of a guest."""

"""The parts of a sweep (`interp.sweep`): what may be shared, how it is laid out, and the forwards that run it."""

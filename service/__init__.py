"""HTTP and processes: the only folder that wires things together."""

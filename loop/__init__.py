"""One night: from labels to a served adapter."""

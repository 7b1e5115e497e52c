"""One module a resource: a handler decodes, calls one function and encodes. Each is built from what it needs."""

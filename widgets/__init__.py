"""Live views of an engine; each is Python beside its own .js and .css."""

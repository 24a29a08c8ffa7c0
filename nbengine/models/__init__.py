"""Model families as specs, one decoder that runs them, and the way their weights come in."""

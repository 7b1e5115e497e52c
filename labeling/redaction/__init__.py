"""Personal data and secrets out of a text, before a person or a model is shown it."""

"""What is looked at before a night trains, by what it is about. `loop.stages.preflight` says in which order."""

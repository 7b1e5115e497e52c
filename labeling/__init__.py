"""From a flagged answer to an accepted label."""

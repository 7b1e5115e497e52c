"""`nightschool bench`: each figure beside its bar, measured as a ratio of two things in one run."""

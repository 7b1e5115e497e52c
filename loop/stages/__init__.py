"""One module a stage; `loop.nightly` lists them in the order in which they run."""

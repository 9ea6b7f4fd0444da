"""A series of checkpoints that someone else wrote, read as the states of a run."""

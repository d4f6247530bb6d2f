"""The facts that a run, a checkpoint or a file of weights gives about its numbers."""

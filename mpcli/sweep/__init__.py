"""Many short runs of one recipe, as trials of an Optuna study, and what they show together."""

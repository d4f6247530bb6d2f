"""Real faults in real training, and what `mptrain diagnose` says of them."""

"""What runs have in common and where they differ, from their run directories; without torch."""

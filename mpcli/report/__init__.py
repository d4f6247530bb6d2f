"""Runs, sweeps and diagnoses as one self-contained HTML file. Never imports torch."""

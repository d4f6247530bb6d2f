"""Engines: the classes that execute a step."""

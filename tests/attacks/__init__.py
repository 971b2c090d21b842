"""Hostile inputs, each by name: model files, pickles, and mutations of good files."""

"""Prompt templates as versioned files: typed variables, examples, a token budget, tests and scores."""

"""Guards of graphs: checks of what goes into a model and of what it says (docs/guardrails.md: what they miss)."""

"""The feature store: Feast in an environment of its own, a point-in-time join that holds, lookups for graphs."""

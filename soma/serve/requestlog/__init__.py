"""The request log: what was asked and answered, and what people thought of it, in Parquet, for those who want it."""

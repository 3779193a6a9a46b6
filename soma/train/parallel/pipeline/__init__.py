"""Pipeline parallelism: a schedule is data, which others make, validate, simulate and draw."""

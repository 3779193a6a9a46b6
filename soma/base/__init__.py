"""The floor that every room stands on: errors, progress, artefact folders, fetching, charts. Loads no torch."""

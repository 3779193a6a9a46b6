"""Annotations: one record that doccano's, Prodigy's and Praat's files are read into and written from, and agreement."""

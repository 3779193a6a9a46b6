"""`soma data annotate`: a page on this machine on which a person labels texts, for doccano and Prodigy."""

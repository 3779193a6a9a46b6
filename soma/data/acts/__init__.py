"""Speech acts: which there are, labelled dialogues, rules for two of them, and the mix of acts in a corpus."""

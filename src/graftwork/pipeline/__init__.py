"""The stages of a run: convert, train, evaluate and report, each restartable from its run folder."""

"""From a large pool of questions to a small training set: quality, difficulty, diversity (s1, arXiv 2501.19393).

Each stage is a function on rows and a subcommand of `s1engine curate`; docs/curate.md tells how they follow each other.
"""

"""The pages to read first: one verb a file, each a story from its configuration to its result.

A recipe takes plain arguments, prints what a person wants to see through `lorica.recipes.console`, and returns a result
that JSON can hold. The command line only parses, calls one of these and turns errors into exit codes.
"""

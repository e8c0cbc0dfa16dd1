"""The numbers of the README and of docs/results.md: what each is, the commands that make it, and whether it holds.

`registry` reads the tables of numbers in `numbers/*.yaml`, `measure` reads a number from what commands left, and
`remake` runs the commands.
"""

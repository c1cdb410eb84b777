"""The command line: `meshbolt COMMAND ...`, also `python -m meshbolt`.

May import: everything below. `main.py` has the table of commands and calls the one that is named; each command has a
file with `run(arguments)`, which returns the exit code: 0 done, 1 the answer is no, 2 bad usage. To add a command, add
its file and its row in `COMMANDS`. Read `main.py` first.
"""

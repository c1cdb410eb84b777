"""`meshbolt checkpoint COMMAND ...`: what can be done with checkpoints from the command line.

May import: `callbacks` and below. `main.py` has the table of commands; each has a file with `run(arguments)`, as those of
`cli` have. `progress.py` shows how far a command is, `told.py` prints what it found. To add a command, add its file and
its row in `COMMANDS`. Read `main.py` first.
"""

"""`meshbolt doctor`: whether this machine and what is installed on it can train, and the command that mends what cannot.

May import: everything below `cli`, but torch, Lightning and what imports them only inside of functions: this command is for
environments in which they are broken. What may crash or hang, such as the first import of torch, happens in a process of its
own. `checks.py` lists what is looked at, `main.py` runs it, `rows.py` is what a check returns, `show.py` prints it. Read
`checks.py` first. To add a check, add a function that returns rows, and a line there.
"""

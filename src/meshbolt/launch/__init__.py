"""Starting ranks on one machine or on several, through torch's own launcher, and seeing to it that all of them end.

May import: `errors` and `environment`; torch in `agent.py` alone. `hosts.py` reads hostfiles and chooses of them, `variables.py`
says what of the environment goes along, `surroundings.py` who has started this process, `program.py` what every rank runs.
`agent.py` runs the ranks of a node, each behind `start.py`; `cluster.py` runs one agent on each host through ssh; `ending.py`
leaves nothing running; `failures.py` says which rank was the first to fail, and with what. Read `agent.py` first.
"""

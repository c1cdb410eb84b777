"""What torch's functions do on tensors of which each rank holds a part.

A rule is a function of the called function and its arguments, registered under the names it serves; it is exact, or raises
`SplitLostError`. To add one, write it in the file of its kind. Read `elementwise.py` first.
"""

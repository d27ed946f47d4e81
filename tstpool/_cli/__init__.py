"""What ``python -m tstpool`` does, one module a command. Private: import nothing from here.

``echo`` and ``demo`` are the commands and need ``rich``. ``services`` holds the demo's server side, ``clients`` its
client side (a program of its own), ``wire`` what those two agree on; these three need the standard library only.
"""
